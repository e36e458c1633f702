"""Shared by the sweeps' tests: a roofline of milliseconds, and threads as they were."""

import pytest
import torch

from benchmarks import roofline


@pytest.fixture
def tiny_machine(monkeypatch):
    """A measured roofline so small that it costs nothing."""
    monkeypatch.setattr(roofline, "FOOTPRINTS", {"cpu": (2**14,)})
    monkeypatch.setattr(roofline, "GEMM_SIZE", {"cpu": 64})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
