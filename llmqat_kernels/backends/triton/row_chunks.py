"""Device functions of the kernels that hold rows in registers, as tuples of chunks (row_tiles)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import numerics


@triton.jit
def appended(chunks, chunk):
    """The tuple ``chunks`` and one more."""
    return chunks + (chunk,)  # noqa: RUF005  (the compiler knows no starred expressions)


@triton.jit
def row_of_program(ROWS: tl.constexpr):
    """int64 row indices [ROWS] of this program."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def chunk_of(
    row, stride, rows, columns, i, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    """Element offsets and mask of chunk ``i`` of rows ``stride`` elements apart."""
    column = i * WIDTH + tl.arange(0, WIDTH)
    mask = tl.full((ROWS, WIDTH), True, tl.int1)
    # The grid covers the rows exactly when a program has one, and all chunks but the last are full.
    if ROWS > 1:
        mask = mask & (row < rows)[:, None]
    if i == CHUNKS - 1:
        mask = mask & (column < columns)[None, :]
    return row[:, None] * stride + column[None, :], mask


@triton.jit
def load_vector(vector, columns, i, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """fp32 chunk ``i`` of a vector that every row shares, [ROWS, WIDTH]."""
    row = tl.full((ROWS,), 0, tl.int64)
    at, mask = chunk_of(row, 0, 1, columns, i, ROWS, WIDTH, CHUNKS)
    return tl.load(vector + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_amax(chunks):
    """Bits of the largest magnitude of each row, [ROWS] (spec 2)."""
    # One instruction for an element, which takes both magnitudes and keeps NaN.
    largest = tl.abs(chunks[0])
    for i in tl.static_range(1, len(chunks)):
        largest = tl.maximum(largest, tl.abs(chunks[i]), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(numerics.magnitude_bits(largest), axis=1)


@triton.jit
def row_tree_sum(chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``tree_sum`` of rows whose terms are not -0, [ROWS] (spec 11).

    A chunk beyond the row would add zeros, so it does not exist.
    """
    for level in tl.static_range(1, 8):
        if len(chunks) > (128 >> level):
            added = ()
            for i in tl.static_range(0, 128 >> level):
                if i + (128 >> level) < len(chunks):
                    added = appended(added, chunks[i] + chunks[i + (128 >> level)])
                else:
                    added = appended(added, chunks[i])
            chunks = added
    total = chunks[0]
    if ROWS == 1:
        # Adding a dimension makes the compiler exchange the row once through shared memory, into
        # a layout whose upper levels are a lane's own; without, it shuffles 8 elements a level.
        total = tl.reshape(total, (WIDTH,))[None, :]
    return numerics.tree_sum(total, ROWS, WIDTH)


@triton.jit
def store_codes(
    chunks, codes, scale, row, rows, columns,
    QMAX: tl.constexpr, BF16_SCALE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Quantize rows held as fp32 chunks; both outputs are contiguous (spec 1-4)."""
    amax = row_amax(chunks)
    s = numerics.scale_of(amax, QMAX, BF16_SCALE)
    inverse, keep = numerics.inverse_of(s), numerics.has_codes(amax, s)
    for i in tl.static_range(0, CHUNKS):
        at, mask = chunk_of(row, columns, rows, columns, i, ROWS, WIDTH, CHUNKS)
        code = numerics.codes_of(chunks[i], inverse[:, None], keep[:, None], QMAX, BF16_SCALE)
        tl.store(codes + at, code.to(tl.int8), mask=mask)
    tl.store(scale + row, s, mask=row < rows)
