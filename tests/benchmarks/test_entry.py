"""The gates of the benchmarks: what they let through and what they stop."""

import pytest
import torch

import llmqat_kernels as qk
from benchmarks.entry import same_bits, within_ratio
from llmqat_kernels import dispatch


def differing(fast, reference):
    """A call whose result depends on the backend."""
    return lambda: reference if dispatch.current_backend() == "reference" else fast


def test_same_bits_stops_one_ulp():
    x = torch.ones(4)
    same_bits(differing(x, x.clone()))()
    with pytest.raises(AssertionError, match="output 0"):
        same_bits(differing(x, torch.nextafter(x, x + 1)))()


def test_within_ratio_allows_twice_the_error_of_the_reference():
    exact = torch.full((4,), 100.0, dtype=torch.float64)
    reference = (exact + 0.01).float()
    within_ratio(differing((exact - 0.019).float(), reference), lambda: exact)()
    with pytest.raises(AssertionError, match="exceeds 2"):
        within_ratio(differing((exact - 0.03).float(), reference), lambda: exact)()


def test_the_gate_leaves_the_backend_as_it_was():
    same_bits(lambda: qk.quantize(torch.ones(2, 3), 8))()
    assert dispatch.current_backend() == "auto"
