"""Row quantization.

Math:     spec 1-6.
Shapes:   x [R, C] -> codes [R, C], scale [R]; a group is a row of group_size elements.
Dtypes:   fp32, fp16, bf16 in; int8 codes, fp32 scales; arithmetic in fp32.
Tiling:   whole rows in registers (row_tiles), so that x is read once; flat tiles elementwise.
Cost:     3 bytes an element of bf16 for quantize and dequantize, 4 for fake_quantize, 6 for its
          backward; memory bound.
Numerics: exact. The maximum is taken over bit patterns, where NaN and infinity win.
Edges:    columns beyond C are masked and read as 0; empty tensors launch nothing.
Limits:   C <= 32,768, or 16,384 if no multiple of 16 (not for the elementwise operators).
Tests:    tests/kernels/test_quantize.py, tests/triton/test_quantize.py
Bench:    python -m benchmarks.run --op quantize fake_quantize --device cuda
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InvalidArgument
from ...spec.quantize import qmax
from . import numerics
from .launch import ALIGNMENT, Variant, aligned, empty, launch, unaligned
from .row_chunks import appended, chunk_of, row_amax, row_of_program, store_codes
from .row_tiles import (
    LONGEST_OF_TILES,
    MAX_COLUMNS,
    MAX_ODD_COLUMNS,
    ROW_LENGTHS,
    flat_tile,
    row_tile,
)

FLAT_WIDTH = 1024
"""Elements of a program that takes a tensor as one row."""


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x, codes, scale, rows, columns,
    QMAX: tl.constexpr, BF16_SCALE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = row_of_program(ROWS)
    chunks = ()
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        chunks = appended(chunks, tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    store_codes(
        chunks, codes, scale, row, rows, columns, QMAX, BF16_SCALE, ROWS, WIDTH, CHUNKS
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def fake_quantize_kernel(
    x, y, rows, columns,
    QMAX: tl.constexpr, BF16_SCALE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = row_of_program(ROWS)
    chunks = ()
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        chunks = appended(chunks, tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    amax = row_amax(chunks)
    s = numerics.scale_of(amax, QMAX, BF16_SCALE)
    inverse, keep = numerics.inverse_of(s), numerics.has_codes(amax, s)
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        code = numerics.codes_of(chunks[i], inverse[:, None], keep[:, None], QMAX, BF16_SCALE)
        result = code.to(tl.float32) * s[:, None]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(codes, scale, y, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = row_of_program(ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    code = tl.load(codes + at, mask=mask, other=0).to(tl.float32)
    s = tl.load(scale + row, mask=row < rows, other=0.0)
    tl.store(y + at, (code * s[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["ste_clip"])
def fake_quantize_backward_kernel(grad, x, dx, n, ste_clip, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    upstream = tl.load(grad + at, mask=at < n, other=0.0)
    passed = tl.where(tl.abs(value) < ste_clip, upstream, 0.0)
    tl.store(dx + at, passed.to(dx.dtype.element_ty), mask=at < n)


def check_columns(name: str, columns: int, fix: str = "use backend 'reference'") -> None:
    """Raise :class:`InvalidArgument` for a row too long for one program."""
    limit = MAX_ODD_COLUMNS if columns % ALIGNMENT else MAX_COLUMNS
    if columns > limit:
        raise InvalidArgument(
            f"{name}: rows of {columns} elements exceed the Triton kernels' {limit}; {fix}"
        )


def as_rows(x: Tensor, group_size: int) -> tuple[Tensor, int, int]:
    """`aligned` x, the number of rows (groups) and their length.

    Raises:
        InvalidArgument: a row too long for one program.
    """
    columns = x.shape[-1] if group_size == -1 else group_size
    check_columns("x", columns)
    return aligned(x), x.numel() // columns if columns else 0, columns


def quantize(
    x: Tensor, bits: int, group_size: int = -1, bf16_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """See spec 1-4."""
    x, rows, columns = as_rows(x, group_size)
    lead = tuple(x.shape[:-1])
    shape = lead if group_size == -1 else (*lead, x.shape[-1] // group_size)
    codes = empty(tuple(x.shape), torch.int8, x.device)
    scale = empty(shape, torch.float32, x.device)
    if columns == 0:
        return codes, scale.fill_(1.0)
    tile = row_tile(columns)
    launch(
        quantize_kernel, (triton.cdiv(rows, tile.rows),), x, codes, scale, rows, columns,
        QMAX=qmax(bits), BF16_SCALE=bf16_scale, **tile.constants(), num_warps=tile.num_warps,
    )  # fmt: skip
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """See spec 5."""
    y = empty(tuple(codes.shape), dtype, codes.device)
    columns = codes.shape[-1] if group_size == -1 else group_size
    if codes.numel() == 0:
        return y
    tile, rows = flat_tile(columns), codes.numel() // columns
    launch(
        dequantize_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.width)),
        aligned(codes), aligned(scale), y, rows, columns, ROWS=tile.rows, WIDTH=tile.width,
    )  # fmt: skip
    return y


def fake_quantize(
    x: Tensor,
    bits: int,
    group_size: int = -1,
    ste_clip: float | None = None,
    bf16_scale: bool = False,
) -> Tensor:
    """See spec 5."""
    x, rows, columns = as_rows(x, group_size)
    y = empty(tuple(x.shape), x.dtype, x.device)
    tile = row_tile(columns)
    launch(
        fake_quantize_kernel, (triton.cdiv(rows, tile.rows),), x, y, rows, columns,
        QMAX=qmax(bits), BF16_SCALE=bf16_scale, **tile.constants(), num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def fake_quantize_backward(grad: Tensor, x: Tensor, ste_clip: float | None) -> Tensor:
    """See spec 6."""
    dx = empty(tuple(grad.shape), grad.dtype, grad.device)
    if ste_clip is None:
        return dx.copy_(grad)
    launch(
        fake_quantize_backward_kernel, (triton.cdiv(grad.numel(), FLAT_WIDTH),),
        aligned(grad), aligned(x), dx, grad.numel(), float(ste_clip), WIDTH=FLAT_WIDTH,
    )  # fmt: skip
    return dx


KERNELS: dict[str, Any] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
}
FLOATS = ("fp32", "fp16", "bf16")


def row_forms(variant: Callable[[int], Variant]) -> Iterator[Variant]:
    """``variant(columns)`` for each width of tile, at the most chunks, with rows that begin at
    multiples of 16 bytes and with rows that begin anywhere."""
    for columns in LONGEST_OF_TILES:
        yield variant(columns)
        if columns <= MAX_ODD_COLUMNS:
            yield unaligned(variant(columns - 1))


def _row_variant(kernel: Any, dtype: str, qmax: int, bf16_scale: bool, columns: int) -> Variant:
    tile = row_tile(columns)
    outputs = {"codes": "*i8", "scale": "*fp32"}
    if kernel is fake_quantize_kernel:
        outputs = {"y": f"*{dtype}"}
    scale = " bf16 scale" if bf16_scale else ""
    return Variant(
        f"{kernel.__name__.removesuffix('_kernel')} {dtype} C={columns} qmax={qmax}{scale}",
        kernel,
        {"x": f"*{dtype}", **outputs, "rows": "i32", "columns": "i32"},
        {"QMAX": qmax, "BF16_SCALE": bf16_scale, **tile.constants()},
        num_warps=tile.num_warps,
        promises=frozenset({"vector_loads"}),
    )


def _elementwise_variants() -> Iterator[Variant]:
    for dtype in FLOATS:
        for columns in (64, 4096):
            tile = flat_tile(columns)
            yield Variant(
                f"dequantize {dtype} C={columns}",
                dequantize_kernel,
                {"codes": "*i8", "scale": "*fp32", "y": f"*{dtype}"}
                | {"rows": "i32", "columns": "i32"},
                {"ROWS": tile.rows, "WIDTH": tile.width},
            )
        for size in ("i32", "i64"):
            pointers = {"grad": f"*{dtype}", "x": f"*{dtype}", "dx": f"*{dtype}"}
            yield Variant(
                f"fake_quantize_backward {dtype}{' n>=2^31' if size == 'i64' else ''}",
                fake_quantize_backward_kernel,
                {**pointers, "n": size, "ste_clip": "fp32"},
                {"WIDTH": FLAT_WIDTH},
                promises=frozenset({"vector_loads"}),
            )


def variants(arch: int) -> Iterator[Variant]:
    """Every form; the bit width only changes a constant."""
    for columns in ROW_LENGTHS:
        if columns not in LONGEST_OF_TILES:
            yield _row_variant(quantize_kernel, "bf16", 127, False, columns)
    for kernel in (quantize_kernel, fake_quantize_kernel):
        for dtype in FLOATS:
            yield from row_forms(partial(_row_variant, kernel, dtype, 127, False))
        # One rounding more for each row: that is checked with one dtype only.
        yield from row_forms(partial(_row_variant, kernel, "bf16", 7, True))
    for variant in _elementwise_variants():
        yield variant
        yield unaligned(variant)
