"""Device functions that the integer matmul kernels share.

The weight is the first operand of every product and the tokens the second, so an accumulator is
[BLOCK_N weight rows, BLOCK_M tokens]: on sm_90 the first operand of wgmma may come from registers,
so weights that are unpacked in registers never return to shared memory, and one instruction covers
64 weight rows by as few as 8 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import INLINE_ASM


@triton.jit
def tile_of(w_tiles, a_tiles, GROUP: tl.constexpr):
    """The (weight tile, token tile) of this program.

    ``GROUP`` token tiles walk the weight together, so that a weight tile is read from L2 and not
    from memory while they do.
    """
    program = tl.program_id(0)
    width = GROUP * w_tiles
    first = program // width * GROUP
    size = tl.minimum(a_tiles - first, GROUP)
    return (program % width) // size, first + (program % width) % size


@triton.jit
def rows_of(tile, BLOCK: tl.constexpr):
    """int64 indices of the rows of a tile."""
    return tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def row_pointers(base, rows, count, stride, BLOCK_K: tl.constexpr):
    """Pointers [rows, BLOCK_K] to the first columns; rows beyond the last read the last one.

    Their results are not stored; without a mask the loads of the hot loop stay asynchronous copies.
    """
    return base + tl.minimum(rows, count - 1)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_columns(pointers, left, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of which ``left`` columns exist; the others are 0."""
    if EVEN_K:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(tl.arange(0, BLOCK_K) < left)[None, :], other=0)
    return tile


@triton.jit
def low_nibbles_times_16(codes):
    """int8 ``16 * low`` of bytes whose low nibble is ``low`` in two's complement: two instructions
    for four bytes. As Triton operators this would be eleven: the compiler splits the bytes."""
    if INLINE_ASM:
        shifted = tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0;",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        shifted = (codes << 4).to(tl.int8)
    return shifted


@triton.jit
def high_nibbles_times_16(codes):
    """int8 ``16 * high`` of bytes whose high nibble is ``high`` in two's complement."""
    return (codes & -16).to(tl.int8)


@triton.jit
def load_weights(pointers, left, PACKED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """int8 [rows, BLOCK_K]: codes, or 16 times the codes of packed weights (spec 8)."""
    if PACKED:
        packed = load_columns(pointers, (left + 1) // 2, EVEN_K, BLOCK_K // 2)
        tile = tl.interleave(low_nibbles_times_16(packed), high_nibbles_times_16(packed))
    else:
        tile = load_columns(pointers, left, EVEN_K, BLOCK_K)
    return tile


@triton.jit
def scales_of(scale, index, count):
    """fp32 scales of rows; 0 beyond the last."""
    return tl.load(scale + index, mask=index < count, other=0.0)


@triton.jit
def group_product(
    a_at, w_at, group_size,
    PACKED: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int32 sums [BLOCK_N, BLOCK_M] over the group that begins at the pointers (spec 7, 18)."""
    W_COLUMNS: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    if STEPS == 1:
        weights = load_weights(w_at, group_size, PACKED, WHOLE, BLOCK_K)
        codes = load_columns(a_at, group_size, WHOLE, BLOCK_K)
        part = tl.dot(weights, tl.trans(codes), part, out_dtype=tl.int32)
    else:
        for step in range(STEPS):
            left = group_size - step * BLOCK_K
            weights = load_weights(w_at + step * W_COLUMNS, left, PACKED, WHOLE, BLOCK_K)
            codes = load_columns(a_at + step * BLOCK_K, left, WHOLE, BLOCK_K)
            part = tl.dot(weights, tl.trans(codes), part, out_dtype=tl.int32)
    if PACKED:
        part = part >> 4
    return part


@triton.jit
def no_terms(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """fp32 -0 [BLOCK_N, BLOCK_M]: what an ordered sum starts from, so that its first term keeps its
    sign. (``tl.full`` of -0.0 gives +0.)
    """
    return tl.full((BLOCK_N, BLOCK_M), -(2**31), tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def store_results(y, result, bias, rows, tokens, limit, n, m):
    """``y[tokens, rows] = result (+ bias)``, one cast, for rows below ``limit``; y is [m, n] and
    result [rows, tokens].
    """
    if bias is not None:
        shift = tl.load(bias + rows, mask=rows < limit, other=0.0).to(tl.float32)
        result = result + shift[:, None]
    mask = (rows < limit)[:, None] & (tokens < m)[None, :]
    at = tokens[None, :] * n + rows[:, None]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)
