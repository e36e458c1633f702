"""Channel groups over tokens: fake_quantize_channels.

Math:     spec 24 (2 to 5 on the elements of a group).
Shapes:   x, y [R, C]; one scale per group_size columns, over all rows.
Dtypes:   fp32, fp16, bf16 in and out; arithmetic in fp32.
Tiling:   128 columns (8 bf16 a lane, half a warp a row) by 8 rows, up to 16 such tiles a program:
          the first kernel raises one maximum a column and program, the second divides once a column
          and program.
Cost:     x is read twice and y written once: 6 bytes an element of bf16; memory bound.
Numerics: exact. The maximum is taken over bit patterns, where NaN and infinity win; maxima of
          programs meet in integer atomics, whose order does not matter.
Edges:    rows and columns beyond the tensor are masked and read as 0; empty tensors launch nothing.
Limits:   none.
Tests:    tests/kernels/test_fake_quantize_channels.py, tests/triton/test_channels.py
Bench:    python -m benchmarks.run --op fake_quantize_channels --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.quantize import qmax
from . import numerics
from .launch import Variant, aligned, empty, launch, unaligned

ROWS, WIDTH = 8, 128
STEPS = 16
"""Row tiles a program: 2,048 tokens of 4,096 columns are 512 programs, enough for any device."""


@triton.jit
def tile_at(first, step, column, rows, columns, ROWS: tl.constexpr):
    """Element offsets and mask of row tile ``step`` of a program whose first row is ``first``."""
    row = first + step * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row[:, None] * columns + column[None, :], mask


@triton.jit(do_not_specialize=["rows", "group_size"])
def channel_amax_kernel(
    x, amax, rows, columns, group_size,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    top = tl.zeros((ROWS, WIDTH), tl.int32)
    for step in range(0, tl.minimum(STEPS, tl.cdiv(rows - first, ROWS))):
        at, mask = tile_at(first, step, column, rows, columns, ROWS)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        top = tl.maximum(top, numerics.magnitude_bits(value))
    tl.atomic_max(amax + column // group_size, tl.max(top, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "group_size"])
def fake_quantize_channels_kernel(
    x, y, amax, rows, columns, group_size,
    QMAX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    bits = tl.load(amax + column // group_size, mask=column < columns, other=0)
    s = numerics.scale_of(bits, QMAX, False)
    inverse, keep = numerics.inverse_of(s), numerics.has_codes(bits, s)
    for step in range(0, tl.minimum(STEPS, tl.cdiv(rows - first, ROWS))):
        at, mask = tile_at(first, step, column, rows, columns, ROWS)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        code = numerics.codes_of(value, inverse[None, :], keep[None, :], QMAX, False)
        result = code.to(tl.float32) * s[None, :]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


def fake_quantize_channels(
    x: Tensor, bits: int, group_size: int, ste_clip: float | None = None
) -> Tensor:
    """See spec 24."""
    x = aligned(x)
    y = empty(tuple(x.shape), x.dtype, x.device)
    columns = x.shape[-1]
    if x.numel() == 0:
        return y
    rows = x.numel() // columns
    amax = empty((columns // group_size,), torch.int32, x.device).zero_()
    grid = (triton.cdiv(rows, ROWS * STEPS), triton.cdiv(columns, WIDTH))
    tile: dict[str, Any] = {"ROWS": ROWS, "WIDTH": WIDTH, "STEPS": STEPS}
    launch(channel_amax_kernel, grid, x, amax, rows, columns, group_size, **tile)
    launch(
        fake_quantize_channels_kernel, grid, x, y, amax, rows, columns, group_size,
        QMAX=qmax(bits), **tile,
    )  # fmt: skip
    return y


KERNELS: dict[str, Any] = {"fake_quantize_channels": fake_quantize_channels}


def _forms() -> Iterator[Variant]:
    tile = {"ROWS": ROWS, "WIDTH": WIDTH, "STEPS": STEPS}
    sizes = {"rows": "i32", "columns": "i32", "group_size": "i32"}
    for dtype in ("fp32", "fp16", "bf16"):
        yield Variant(
            f"channel_amax {dtype}",
            channel_amax_kernel,
            {"x": f"*{dtype}", "amax": "*i32", **sizes},
            tile,
            promises=frozenset({"vector_loads"}),
        )
        yield Variant(
            f"fake_quantize_channels {dtype} qmax=7",
            fake_quantize_channels_kernel,
            {"x": f"*{dtype}", "y": f"*{dtype}", "amax": "*i32", **sizes},
            {"QMAX": qmax(4), **tile},
            promises=frozenset({"vector_loads"}),
        )


def variants(arch: int) -> Iterator[Variant]:
    """Every form: the bit width only changes a constant, and sizes none."""
    for form in _forms():
        yield form
        yield unaligned(form)
