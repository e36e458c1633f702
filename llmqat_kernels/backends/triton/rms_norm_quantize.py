"""RMSNorm, alone and fused with the residual sum before it and the quantization after it.

Math:     spec 12; the backward is that of the real function, in fp32, one cast (spec 19).
Shapes:   x, residual, sum [R, K], weight [K] -> y or codes [R, K], scale [R].
Dtypes:   fp32, fp16, bf16; weight of any of them; int8 codes, fp32 scales; fp32 arithmetic.
Tiling:   whole rows in registers (row_tiles). The backward gives each program every P-th row, so
          that dweight stays in registers and P partial sums remain; rows beyond MAX_HELD_BYTES
          are read twice, again from the L2 cache, and dweight is summed in the workspace.
Cost:     3 bytes an element of bf16, 7 with a residual; memory bound. The backward: 8 with the
          gradient of the sum, and 8 P K bytes for the partial sums.
Numerics: forward exact (tree_sum); backward by the 3x rule, deterministic: no atomics.
Edges:    columns beyond K are masked and read as 0; empty tensors launch nothing.
Limits:   K <= 32,768 forward, or 16,384 if no multiple of 16.
Tests:    tests/triton/test_rms_norm_quantize.py, tests/kernels/test_rms_norm_quantize_spec.py
Bench:    python -m benchmarks.run --op rms_norm_quantize --device cuda
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.quantize import qmax
from . import numerics
from .launch import ALIGNMENT, Variant, aligned, empty, launch, unaligned
from .quantize import FLOATS, as_rows, row_forms
from .row_chunks import appended, chunk_of, load_vector, row_of_program, row_tree_sum, store_codes
from .row_tiles import LONGEST_OF_TILES, ROW_LENGTHS, next_power_of_two, row_tile

MAX_HELD_BYTES = 16_384
"""Longest row whose x, gradients and weight gradient fit the registers of one backward program."""
LONG_WIDTH = 4096
"""Piece of a longer row."""
SUM_ROWS, SUM_COLUMNS = 32, 32
"""Tile of the sum over the programs' partial weight gradients."""


@triton.jit
def _normed(
    chunks, weight, columns, eps,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """RMSNorm of rows held as fp32 chunks: fp32 chunks rounded to DTYPE (spec 12)."""
    squares = ()
    for i in tl.static_range(0, CHUNKS):
        squares = appended(squares, chunks[i] * chunks[i])
    total = row_tree_sum(squares, ROWS, WIDTH)
    mean = tl.div_rn(total, tl.zeros_like(total) + columns)
    r = numerics.inverse_of(tl.sqrt_rn(mean + eps))[:, None]
    out = ()
    for i in tl.static_range(0, CHUNKS):
        normed = (chunks[i] * r).to(DTYPE).to(tl.float32)
        y = normed * load_vector(weight, columns, i, ROWS, WIDTH, CHUNKS)
        out = appended(out, y.to(DTYPE).to(tl.float32))
    return out


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_kernel(
    x, weight, y, rows, columns, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = row_of_program(ROWS)
    chunks = ()
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        chunks = appended(chunks, tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    chunks = _normed(chunks, weight, columns, eps, x.dtype.element_ty, ROWS, WIDTH, CHUNKS)
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        tl.store(y + at, chunks[i].to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_quantize_kernel(
    x, residual, weight, codes, scale, total, rows, columns, eps,
    QMAX: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    row = row_of_program(ROWS)
    chunks = ()
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            more = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            narrow = (value + more).to(dtype)
            tl.store(total + at, narrow, mask=mask)
            value = narrow.to(tl.float32)
        chunks = appended(chunks, value)
    chunks = _normed(chunks, weight, columns, eps, dtype, ROWS, WIDTH, CHUNKS)
    store_codes(chunks, codes, scale, row, rows, columns, QMAX, False, ROWS, WIDTH, CHUNKS)


@triton.jit
def _gradient(x, grad, weight, r, dot, columns):
    """fp32 dx of one piece; ``dot`` = sum of grad * weight * x over the row, r = 1 / rms."""
    mean = tl.div_rn(r * dot, tl.zeros_like(dot) + columns)
    return r * (grad * weight - (x * r) * mean)


@triton.jit
def _inverse_rms(square_sum, columns, eps):
    mean = tl.div_rn(square_sum, tl.zeros_like(square_sum) + columns)
    return numerics.inverse_of(tl.sqrt_rn(mean + eps))


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_backward_kernel(
    grad, x, weight, grad_total, dx, partial, rows, columns, eps,
    HAS_TOTAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < columns
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * columns + column
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        r = _inverse_rms(tl.sum(value * value, axis=0), columns, eps)
        d = _gradient(value, g, w, r, tl.sum(g * w * value, axis=0), columns)
        if HAS_TOTAL:
            d += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
        dweight += g * (value * r)
    tl.store(partial + program * columns + column, dweight, mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_backward_long_kernel(
    grad, x, weight, grad_total, dx, partial, rows, columns, eps,
    HAS_TOTAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    for row in range(program, rows, tl.num_programs(0)):
        squares = tl.zeros((WIDTH,), tl.float32)
        products = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, columns, WIDTH):
            column = start + lane
            mask = column < columns
            value = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
            squares += value * value
            products += g * w * value
        r = _inverse_rms(tl.sum(squares, axis=0), columns, eps)
        dot = tl.sum(products, axis=0)
        for start in range(0, columns, WIDTH):
            column = start + lane
            mask = column < columns
            at = row * columns + column
            value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
            d = _gradient(value, g, w, r, dot, columns)
            if HAS_TOTAL:
                d += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
            # The same lanes read what they wrote for this program's previous row.
            own = partial + program * columns + column
            before = tl.load(own, mask=mask & (row != program), other=0.0)
            tl.store(own, before + g * (value * r), mask=mask)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partial, dweight, programs, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (column < columns)[None, :]
        total += tl.load(partial + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(dweight.dtype.element_ty)
    tl.store(dweight + column, result, mask=column < columns)


def own_weight(x: Tensor, weight: Tensor) -> Tensor:
    """A weight of the dtype of x or of fp32, which holds every value of the third."""
    kept = weight.dtype in (x.dtype, torch.float32)
    return aligned(weight if kept else weight.to(torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See spec 12."""
    x, rows, columns = as_rows(x, -1)
    y = empty(tuple(x.shape), x.dtype, x.device)
    tile = row_tile(columns)
    launch(
        rms_norm_kernel, (triton.cdiv(rows, tile.rows),),
        x, own_weight(x, weight), y, rows, columns, eps,
        **tile.constants(), num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec 12."""
    x, rows, columns = as_rows(x, -1)
    codes = empty(tuple(x.shape), torch.int8, x.device)
    scale = empty(tuple(x.shape[:-1]), torch.float32, x.device)
    total = empty((0,) if residual is None else tuple(x.shape), x.dtype, x.device)
    if columns == 0:
        return codes, scale.fill_(1.0), total
    tile = row_tile(columns)
    launch(
        rms_norm_quantize_kernel, (triton.cdiv(rows, tile.rows),),
        x, x if residual is None else aligned(residual), own_weight(x, weight),
        codes, scale, total, rows, columns, eps,
        QMAX=qmax(bits), HAS_RESIDUAL=residual is not None,
        **tile.constants(), num_warps=tile.num_warps,
    )  # fmt: skip
    return codes, scale, total


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one stands for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def backward_programs(rows: int, processors: int) -> int:
    """Programs of the backward: two a multiprocessor, which bounds the partial sums."""
    return min(rows, 2 * processors)


def backward_tile(columns: int, itemsize: int) -> tuple[bool, int, int]:
    """(whether the row is read twice, elements a piece, warps) of the backward."""
    # Rows that begin anywhere are loaded element by element, which takes registers.
    if columns * itemsize > (MAX_HELD_BYTES // 2 if columns % ALIGNMENT else MAX_HELD_BYTES):
        return True, LONG_WIDTH, 8
    width = max(next_power_of_two(columns), 256)
    return False, width, max(1, min(16, width // 512))


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See spec 12 and 19."""
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    dx = empty(tuple(x.shape), x.dtype, x.device)
    dweight = empty((columns,), weight.dtype, x.device)
    if rows == 0:
        return dx, dweight.zero_()
    long, width, warps = backward_tile(columns, x.element_size())
    programs = backward_programs(rows, _processors(x.device))
    partial = empty((programs, columns), torch.float32, x.device)
    grad = aligned(grad)
    launch(
        rms_norm_backward_long_kernel if long else rms_norm_backward_kernel, (programs,),
        grad, aligned(x), own_weight(x, weight),
        grad if grad_total is None else aligned(grad_total), dx, partial,
        rows, columns, eps, HAS_TOTAL=grad_total is not None, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    launch(
        sum_partials_kernel, (triton.cdiv(columns, SUM_COLUMNS),), partial, dweight,
        programs, columns, ROWS=SUM_ROWS, WIDTH=SUM_COLUMNS,
    )  # fmt: skip
    return dx, dweight


KERNELS: dict[str, Any] = {
    "rms_norm": rms_norm,
    "rms_norm_quantize": rms_norm_quantize,
    "rms_norm_backward": rms_norm_backward,
}
SIZES = {"rows": "i32", "columns": "i32", "eps": "fp32"}
WIDE = frozenset({"vector_loads"})


def _norm_variant(dtype: str, weight: str, columns: int) -> Variant:
    tile, p = row_tile(columns), f"*{dtype}"
    return Variant(
        f"rms_norm {dtype} weight {weight} K={columns}",
        rms_norm_kernel,
        {"x": p, "weight": f"*{weight}", "y": p, **SIZES},
        tile.constants(),
        num_warps=tile.num_warps,
        promises=WIDE,
    )


def _forward_variant(dtype: str, weight: str, residual: bool, columns: int) -> Variant:
    tile, p = row_tile(columns), f"*{dtype}"
    return Variant(
        f"rms_norm_quantize {dtype} weight {weight} K={columns} qmax=127 residual={residual}",
        rms_norm_quantize_kernel,
        {"x": p, "residual": p, "weight": f"*{weight}", "codes": "*i8", "scale": "*fp32"}
        | {"total": p, **SIZES},
        {"QMAX": 127, "HAS_RESIDUAL": residual, **tile.constants()},
        num_warps=tile.num_warps,
        promises=WIDE,
    )


def _backward_variant(dtype: str, weight: str, total: bool, columns: int) -> Variant:
    long, width, warps = backward_tile(columns, 4 if dtype == "fp32" else 2)
    kernel = rms_norm_backward_long_kernel if long else rms_norm_backward_kernel
    names = dict.fromkeys(("grad", "x", "weight", "grad_total", "dx"), f"*{dtype}")
    return Variant(
        f"rms_norm_backward {dtype} weight {weight} K={columns} total={total}",
        kernel,
        {**names, "weight": f"*{weight}", "partial": "*fp32", **SIZES},
        {"HAS_TOTAL": total, "WIDTH": width},
        num_warps=warps,
        promises=WIDE,
    )


def _sum_variant(dtype: str) -> Variant:
    return Variant(
        f"sum_partials {dtype}",
        sum_partials_kernel,
        {"partial": "*fp32", "dweight": f"*{dtype}", "programs": "i32", "columns": "i32"},
        {"ROWS": SUM_ROWS, "WIDTH": SUM_COLUMNS},
        promises=WIDE,
    )


def variants(arch: int) -> Iterator[Variant]:
    """Every form; the bit width only changes a constant."""
    for columns in ROW_LENGTHS:
        if columns not in LONGEST_OF_TILES:
            yield _forward_variant("bf16", "bf16", True, columns)
    for dtype in FLOATS:
        for weight in dict.fromkeys((dtype, "fp32")):
            yield from row_forms(functools.partial(_norm_variant, dtype, weight))
            # Without the sum a form holds less: that is checked with the usual weight only.
            for flag in (True, False) if weight == dtype else (True,):
                yield from row_forms(functools.partial(_forward_variant, dtype, weight, flag))
                held = MAX_HELD_BYTES // (4 if dtype == "fp32" else 2)
                for columns in (576, held, 28672):
                    yield _backward_variant(dtype, weight, flag, columns)
                for columns in (held // 2 - 1, 28671):
                    yield unaligned(_backward_variant(dtype, weight, flag, columns))
        yield _sum_variant(dtype)
        yield unaligned(_sum_variant(dtype))
