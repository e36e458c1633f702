"""How kernels of this backend are launched, and where their outputs come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import interpreting

ALIGNMENT = 16
"""Bytes of the widest load; also what an integer argument may be known to be a multiple of."""
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Of every launch and every ahead-of-time compilation: a contracted multiply-add would round once
where the specification rounds twice."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace of a kernel; tests put guard bands around it."""
    return torch.empty(shape, dtype=dtype, device=device)


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and beginning at a multiple of 16 bytes: a view that does not is copied, which
    costs less than a kernel that loads it byte by byte."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def rows_near(x: Tensor) -> Tensor:
    """x with adjacent columns and rows that are less than 2^31 elements apart; a view of a wider
    tensor stays a view."""
    adjacent = x.stride(-1) == 1 and max(x.stride()) < 2**31
    return x if adjacent else x.clone(memory_format=torch.contiguous_format)


def multiples(kernel: Any, args: Sequence[Any]) -> bool:
    """Whether a launch may promise the compiler that its arguments are multiples of 16.

    Left to itself the JIT compiles another form for each set of arguments that happen to be
    multiples of 16, or 1: too many to check. Here either all integers and pointers that the kernel
    does not list in ``do_not_specialize`` are multiples, or nothing is promised of any.
    """
    return all(
        (value.data_ptr() if isinstance(value, Tensor) else value) % ALIGNMENT == 0
        for parameter, value in zip(kernel.params, args, strict=False)
        if not parameter.do_not_specialize and (isinstance(value, Tensor) or type(value) is int)
    )


_unspecialized: dict[int, Any] = {}


def unspecialized(kernel: Any) -> Any:
    """``kernel`` as the JIT compiles it with nothing known of its arguments but their types."""
    if id(kernel) not in _unspecialized:
        import triton

        _unspecialized[id(kernel)] = triton.jit(kernel.fn, do_not_specialize=kernel.arg_names)
    return _unspecialized[id(kernel)]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    regular: bool = True,
    **constants: Any,
) -> None:
    """Run ``kernel`` on the device of its first tensor; an empty grid runs nothing.

    If not ``regular``, the compiler knows nothing of the arguments, as where `multiples` says so.
    """
    if 0 in grid:
        return
    if interpreting():
        kernel[grid](*args, **constants, **OPTIONS)
        return
    if not (regular and multiples(kernel, args)):
        kernel = unspecialized(kernel)
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device):
        kernel[grid](*args, **constants, **OPTIONS)


@dataclass(frozen=True)
class Variant:
    """One compiled form that a launch can select, for ahead-of-time compilation and its gates.

    Attributes:
        name: ``quantize bf16 C<=4096``: what a reader of the table calls it.
        kernel: the ``@triton.jit`` function.
        signature: type of every argument that is no constant: ``"*bf16"``, ``"i32"``, ``"fp32"``.
        constants: value of every constexpr argument (and None for absent pointers).
        num_warps, num_stages: launch options.
        aligned: whether the compiler knows that the integer arguments and the pointers are
            multiples of 16 (all but those in the kernel's ``do_not_specialize``); see `multiples`.
        promises: what the compiled code must show: ``int8_mma`` (IMMA on sm_80, wgmma on sm_90),
            ``float_mma``, ``vector_loads`` (16 bytes).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: bool = True
    promises: frozenset[str] = field(default_factory=frozenset)


def unaligned(variant: Variant) -> Variant:
    """The form of the same launch with rows or pointers that begin anywhere."""
    promises = variant.promises - {"vector_loads"}
    return replace(variant, name=f"{variant.name} unaligned", aligned=False, promises=promises)


TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "u1",
}

Operator = Callable[..., Any]
