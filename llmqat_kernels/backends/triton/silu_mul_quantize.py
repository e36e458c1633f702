"""SiLU(gate) * up, alone and fused with the quantization of the product.

Math:     spec 13, 14; the backward is that of the real function, in fp32, one cast (spec 19).
Shapes:   gate, up [R, K], rows any distance apart (halves of one [R, 2K]) -> y or codes [R, K],
          scale [R].
Dtypes:   fp32, fp16, bf16 in; int8 codes, fp32 scales; fp32 arithmetic.
Tiling:   whole rows in registers (row_tiles) for codes; flat tiles elementwise.
Cost:     5 bytes an element of bf16 for codes, 6 for y, 10 for the backward; memory bound, with
          35, 31 and 29 instructions (SASS) close behind.
Numerics: forward exact, for 16-bit gates by numerics.silu_of_16_bits; backward by the 3x rule.
Edges:    columns beyond K are masked and read as 0, whose product is 0; empty tensors launch
          nothing.
Limits:   K <= 32,768 for codes, or 16,384 if no multiple of 16; fp32 rows beyond 24,576 are two
          kernels.
Tests:    tests/triton/test_silu_mul_quantize.py, tests/kernels/test_silu_mul_quantize_spec.py
Bench:    python -m benchmarks.run --op silu_mul_quantize --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.quantize import qmax
from . import numerics
from .launch import ALIGNMENT, Variant, aligned, empty, launch, rows_near, unaligned
from .quantize import FLOATS, check_columns, quantize, row_forms
from .row_chunks import appended, chunk_of, row_of_program, store_codes
from .row_tiles import LONGEST_OF_TILES, ROW_LENGTHS, flat_tile, row_tile

MAX_GRID_ROWS = 65_535
"""CUDA's limit of the second grid dimension."""
NARROWEST = 256
"""Elements of the smallest elementwise program."""
MAX_FUSED_BYTES = 6 * 4096 * 4
"""Longest row whose operands and product fit the registers: all of bf16, fp32 to 24,576 elements.
Longer ones are two kernels."""


@triton.jit
def _silu_mul(gate, up, DTYPE: tl.constexpr, INFINITE: tl.constexpr):
    """fp32 product of fp32 blocks of values of DTYPE, rounded to DTYPE (spec 14). A gate of +inf
    may give NaN unless ``INFINITE``: a row's codes are the same."""
    if DTYPE == tl.float32:
        silu = tl.div_rn(gate, 1.0 + numerics.exp(-gate))
    else:
        silu = numerics.silu_of_16_bits(gate)
        if INFINITE:
            silu = tl.where(gate == float("inf"), gate, silu)
    return (silu.to(DTYPE).to(tl.float32) * up).to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def silu_mul_quantize_kernel(
    gate, up, codes, scale, gate_stride, up_stride, rows, columns,
    QMAX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = row_of_program(ROWS)
    chunks = ()
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, gate_stride, rows, columns, i, ROWS, WIDTH, CHUNKS)
        g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        at, mask = chunk_of(row, up_stride, rows, columns, i, ROWS, WIDTH, CHUNKS)
        u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        chunks = appended(chunks, _silu_mul(g, u, gate.dtype.element_ty, False))
    store_codes(chunks, codes, scale, row, rows, columns, QMAX, False, ROWS, WIDTH, CHUNKS)


@triton.jit
def silu_mul_kernel(gate, up, y, gate_stride, up_stride, columns, WIDTH: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    result = _silu_mul(g, u, gate.dtype.element_ty, True)
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_backward_kernel(
    grad, gate, up, dgate, dup, gate_stride, up_stride, columns, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = column < columns
    d = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = numerics.near_inverse(1.0 + tl.exp(-g))
    dg = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    du = d * g * sigmoid
    tl.store(dgate + row * columns + column, dg.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * columns + column, du.to(dup.dtype.element_ty), mask=mask)


def strided_rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor over the rows of ``x`` [..., K] and the distance of two rows in elements; copies
    only what is no set of equally distant rows, or would be one of whole vectors.
    """
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    places = (rows.stride(0), rows.data_ptr())
    if rows.shape[-1] % ALIGNMENT == 0 and any(place % ALIGNMENT for place in places):
        rows = aligned(rows)
    rows = rows_near(rows)
    return rows, rows.stride(0)


def _grid(gate: Tensor, up: Tensor) -> tuple[Tensor, int, Tensor, int, int, int]:
    """Both operands with row strides, the number of rows and their length for an elementwise
    kernel: one row where both are contiguous.
    """
    if gate.is_contiguous() and up.is_contiguous():
        return aligned(gate), 0, aligned(up), 0, 1, gate.numel()
    (gate, gate_stride), (up, up_stride) = strided_rows(gate), strided_rows(up)
    if gate.shape[0] > MAX_GRID_ROWS:
        return aligned(gate), 0, aligned(up), 0, 1, gate.numel()
    return gate, gate_stride, up, up_stride, *gate.shape


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See spec 14."""
    y = empty(tuple(gate.shape), gate.dtype, gate.device)
    if y.numel() == 0:
        return y
    gate, gate_stride, up, up_stride, rows, columns = _grid(gate, up)
    width = flat_tile(max(columns, NARROWEST)).width
    launch(
        silu_mul_kernel, (triton.cdiv(columns, width), rows),
        gate, up, y, gate_stride, up_stride, columns, WIDTH=width,
    )  # fmt: skip
    return y


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See spec 14."""
    columns = gate.shape[-1]
    check_columns("gate", columns)
    if columns * gate.element_size() > MAX_FUSED_BYTES:
        return quantize(silu_mul(gate, up), bits)
    codes = empty(tuple(gate.shape), torch.int8, gate.device)
    scale = empty(tuple(gate.shape[:-1]), torch.float32, gate.device)
    if codes.numel() == 0:
        return codes, scale.fill_(1.0)
    (gate, gate_stride), (up, up_stride) = strided_rows(gate), strided_rows(up)
    tile, rows = row_tile(columns), gate.shape[0]
    launch(
        silu_mul_quantize_kernel, (triton.cdiv(rows, tile.rows),),
        gate, up, codes, scale, gate_stride, up_stride, rows, columns,
        QMAX=qmax(bits), **tile.constants(), num_warps=tile.num_warps,
    )  # fmt: skip
    return codes, scale


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See spec 14 and 19."""
    dgate = empty(tuple(gate.shape), gate.dtype, gate.device)
    dup = empty(tuple(up.shape), up.dtype, up.device)
    if dgate.numel() == 0:
        return dgate, dup
    gate, gate_stride, up, up_stride, rows, columns = _grid(gate, up)
    width = flat_tile(max(columns, NARROWEST)).width
    launch(
        silu_mul_backward_kernel, (triton.cdiv(columns, width), rows),
        aligned(grad), gate, up, dgate, dup, gate_stride, up_stride, columns, WIDTH=width,
    )  # fmt: skip
    return dgate, dup


KERNELS: dict[str, Any] = {
    "silu_mul": silu_mul,
    "silu_mul_quantize": silu_mul_quantize,
    "silu_mul_backward": silu_mul_backward,
}
STRIDES = {"gate_stride": "i32", "up_stride": "i32"}
WIDE = frozenset({"vector_loads"})


def _promises(kernel: Any, dtype: str) -> frozenset[str]:
    if kernel is silu_mul_backward_kernel:
        return WIDE | {"approximate"}
    return WIDE if dtype == "fp32" else WIDE | {"proven_silu"}


def _row_variant(dtype: str, columns: int) -> Variant:
    columns = min(columns, MAX_FUSED_BYTES // (4 if dtype == "fp32" else 2))
    tile, p = row_tile(columns), f"*{dtype}"
    return Variant(
        f"silu_mul_quantize {dtype} K={columns} qmax=127",
        silu_mul_quantize_kernel,
        {"gate": p, "up": p, "codes": "*i8", "scale": "*fp32", **STRIDES}
        | {"rows": "i32", "columns": "i32"},
        {"QMAX": 127, **tile.constants()},
        num_warps=tile.num_warps,
        promises=_promises(silu_mul_quantize_kernel, dtype),
    )


def _flat_variant(kernel: Any, names: tuple[str, ...], dtype: str, columns: int) -> Variant:
    """An elementwise form; 2^31 columns or more are a tensor as one row."""
    size = "i64" if columns >= 2**31 else "i32"
    width = flat_tile(columns).width
    return Variant(
        f"{kernel.__name__.removesuffix('_kernel')} {dtype}"
        f"{' n>=2^31' if size == 'i64' else f' {width}'}",
        kernel,
        {**dict.fromkeys(names, f"*{dtype}"), **STRIDES, "columns": size},
        {"WIDTH": width},
        promises=_promises(kernel, dtype),
    )


def variants(arch: int) -> Iterator[Variant]:
    """Every form; the bit width only changes a constant."""
    for columns in ROW_LENGTHS:
        if columns not in LONGEST_OF_TILES:
            yield _row_variant("bf16", columns)
    for dtype in FLOATS:
        yield from row_forms(partial(_row_variant, dtype))
        for kernel, names in (
            (silu_mul_kernel, ("gate", "up", "y")),
            (silu_mul_backward_kernel, ("grad", "gate", "up", "dgate", "dup")),
        ):
            for columns in (4096, 2**31):
                form = _flat_variant(kernel, names, dtype, columns)
                yield form
                yield unaligned(form)
