"""How kernels of this backend are launched, and where their outputs come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Of every launch and every ahead-of-time compilation: a contracted multiply-add would round once
where the specification rounds twice."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace of a kernel; tests put guard bands around it."""
    return torch.empty(shape, dtype=dtype, device=device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run ``kernel`` on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **OPTIONS)
    else:
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
        divisible: integer arguments that are multiples of 16 in this form (pointers always are).
        promises: what the compiled code must show: ``int8_mma`` (IMMA on sm_80, wgmma on sm_90),
            ``float_mma``, ``vector_loads`` (16 bytes).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    promises: frozenset[str] = field(default_factory=frozenset)


TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}

Operator = Callable[..., Any]
