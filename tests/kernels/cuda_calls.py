"""One call of an operator that the native library has for CUDA: arguments, and what must come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmqat_kernels.backends.reference import REFERENCE
from llmqat_kernels.schemas import SCHEMAS
from llmqat_kernels.testing import assert_same_bits


@dataclass(frozen=True)
class Case:
    """A call.

    Args:
        args: what the operator takes; made on the CPU.
        want: computes the result on the CPU where it is not simply the reference's on the same
            arguments (a weight layout is a backend's own).
        limit: error relative to the largest value of the same row; 0: exact.
        small: runs under compute-sanitizer too, which makes a kernel a hundred times slower.
    """

    args: tuple[Any, ...]
    want: Callable[[], Any] | None = None
    limit: float = 0.0
    small: bool = True

    def on(self, device: torch.device | str) -> Case:
        """The same call with copies of its tensors on ``device``."""
        return replace(self, args=moved(self.args, device))


def moved(value: Any, device: torch.device | str) -> Any:
    """Copies of tensors on ``device``, also of those in a tuple."""
    if isinstance(value, tuple | list):
        return tuple(moved(each, device) for each in value)
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def on_cpu(value: Any) -> Any:
    """Copies of tensors on the CPU, also of those in a tuple."""
    return moved(value, "cpu")


def expected(op: str, case: Case) -> Any:
    """What the reference makes of the same arguments, on the CPU; it changes what it may change
    in its own copies, which come back too."""
    if case.want is not None:
        return case.want()
    args = on_cpu(case.args)
    return outcome(op, args, REFERENCE[op](*args))


def outcome(op: str, args: tuple[Any, ...], result: Any) -> Any:
    """What a call gives: its result, and its arguments where it writes to some of them."""
    if "!" not in SCHEMAS[op]:
        return result
    return args if result is None else (result, *args)


def _assert_close(actual: Tensor, wanted: Tensor, limit: float, name: str) -> None:
    """Floats within ``limit`` of the largest of their row [..., C]."""
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape), name
    error = (actual.double() - wanted.double()).abs()
    allowed = limit * wanted.double().abs()
    if wanted.numel():
        allowed = allowed.amax(-1, keepdim=True)
    wrong = ~(error <= allowed)  # NaN is not small
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        pair = actual[where].item(), wanted[where].item()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ by more than {limit:.0e},"
            f" first at {where}: {pair}"
        )


def assert_agrees(op: str, case: Case, got: Any, what: str = "") -> None:
    """``got``, on the CPU, is what the reference makes of the case: the result, or the arguments
    of an operator that has none."""
    want = expected(op, case)
    if op == "attention_decode_quantize":  # codes are exactly those of the row beside them
        (got, *codes), want = got, want[0]
        made = REFERENCE["quantize"](got.flatten(1), case.args[-1])
        for name, one, other in zip(("codes", "scale"), codes, made, strict=True):
            assert_same_bits(one, other, f"{op} {what}: {name}")
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for index, (one, other) in enumerate(pairs):
        name = f"{op} {what}: tensor {index}"
        if not isinstance(other, Tensor):
            continue
        if case.limit == 0:
            assert_same_bits(one, other, name)
        else:
            _assert_close(one, other, case.limit, name)
