"""Timing on a device: the parts that need none, and with a device the whole."""

import pytest
import torch

from benchmarks import cuda


def test_copies_fill_the_cache_four_times():
    assert cuda.copies_for(traffic=100, l2_bytes=50) == 2
    assert cuda.copies_for(traffic=25_000_000, l2_bytes=50_000_000) == 8
    assert cuda.copies_for(traffic=10**9, l2_bytes=50_000_000) == 1
    assert cuda.copies_for(traffic=1, l2_bytes=50_000_000) == cuda.MAX_COPIES
    assert cuda.copies_for(traffic=0, l2_bytes=1) == 4


def test_a_turn_calls_every_copy_in_order():
    calls = []
    cuda.turn([lambda: calls.append(1), lambda: calls.append(2)])()
    assert calls == [1, 2]


def test_a_graph_holds_many_short_calls_and_few_long_ones():
    assert cuda.turns_in_graph(20e-6, 5) == 12  # 60 calls
    assert cuda.turns_in_graph(300e-6, 5) == 2
    assert cuda.turns_in_graph(5e-3, 1) == 1
    assert cuda.turns_in_graph(1e-6, 64) == 1
    assert cuda.turns_in_graph(1e-6, 1) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_events_and_memory():
    x = torch.randn(1 << 20, device="cuda")
    seconds, how = cuda.times({"graph": [lambda: x * 2], "events": [lambda: x.sum().item()]}, 2)
    assert how == {"graph": "graph", "events": "events"}
    assert all(0 < t < 1 for values in seconds.values() for t in values)
    assert cuda.peak_bytes(lambda: x * 2) == 0
    assert cuda.peak_bytes(lambda: (x * 2 + 1).sum()) >= x.nbytes
