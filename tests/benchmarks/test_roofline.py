"""The roofline: which roof an op is held against, and that measuring gives numbers."""

import torch

from benchmarks import roofline
from benchmarks.entry import Cost
from benchmarks.roofline import Roofline
from benchmarks.timing import wall_seconds

ROOF = Roofline({1000: 100.0, 4000: 50.0}, fp32=10.0, bf16=20.0, int8=40.0)


def test_bandwidth_is_that_of_the_largest_footprint_not_above_the_traffic():
    assert [ROOF.bandwidth_at(size) for size in (10, 1000, 3999, 4000, 9999)] == [
        100.0,
        100.0,
        100.0,
        50.0,
        50.0,
    ]


def test_the_longer_of_memory_and_compute_is_the_bound():
    assert ROOF.bound(Cost(1000), torch.float32) == (10.0, "memory")
    assert ROOF.bound(Cost(1000, 50, 400), torch.float32) == (15.0, "compute")
    assert ROOF.bound(Cost(1000, 300), torch.bfloat16) == (15.0, "compute")


def test_measuring(monkeypatch):
    monkeypatch.setattr(roofline, "FOOTPRINTS", {"cpu": (2**12, 2**14)})
    monkeypatch.setattr(roofline, "GEMM_SIZE", {"cpu": 64})
    found = roofline.measure(torch.device("cpu"), wall_seconds, 1e-4)
    assert list(found.bandwidth) == [2**12, 2**14]
    assert min(*found.bandwidth.values(), found.fp32, found.bf16, found.int8) > 0
    assert "GEMM peak" in roofline.describe(found)


def test_repetitions_fill_the_time():
    calls = []
    count = roofline.repetitions(lambda: calls.append(1), lambda f: (f(), 0.01)[1], 0.035)
    assert count == 4
    roofline.repeated(lambda: calls.append(2), count)()
    assert calls.count(2) == 4
