"""The gates of the benchmarks: what they let through and what they stop."""

import pytest
import torch

import llmqat_kernels as qk
from benchmarks.entry import Job, reason_of, same_bits, with_optional, within_ratio
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


def broken():
    raise AttributeError("module has no attribute 'quantize'\nand more lines")


def absent():
    import a_package_that_nobody_has  # noqa: F401


def test_optional_baselines_that_work_are_kept_and_the_others_named():
    x = torch.ones(4)
    job = Job(
        lambda: x,
        {"eager": lambda: x},
        lambda: None,
        1e-3,
        {
            "good": lambda: lambda: x * 1.1,
            "broken": broken,
            "absent": absent,
            "fails when called": lambda: broken,
            "other shape": lambda: lambda: x[:2],
            "garbage": lambda: lambda: -x,
        },
    )
    kept, reasons = with_optional(job)
    assert set(kept.baselines) == {"eager", "good"} and not kept.optional
    assert reasons.pop("absent") == "not installed (a_package_that_nobody_has)"
    assert reasons["broken"] == "AttributeError: module has no attribute 'quantize'"
    assert set(reasons) == {"broken", "fails when called", "other shape", "garbage"}
    assert "differs by" in reasons["garbage"] and "shape" in reasons["other shape"]


def test_a_reason_is_one_short_line():
    assert reason_of(ValueError("x" * 999 + "\ny")).startswith("ValueError: xxx")
    assert len(reason_of(ValueError("x" * 999))) == 160
    assert reason_of(ValueError()) == "ValueError"
