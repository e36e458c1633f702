"""Heads of one token as two tiles of half heads: load, rotate, quantize, store (device functions).

RoPE pairs column d with column d + D / 2: with the halves in two tiles of one shape a pair lies in
one lane (spec 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ...errors import InvalidArgument
from . import numerics
from .row_tiles import SHORTEST, next_power_of_two

MAX_TOKEN = 16_384
"""Elements that share a scale: 16 a lane of a program of 32 warps; more would not fit registers."""


@dataclass(frozen=True)
class HeadTile:
    """``heads`` heads a program, as two halves of ``half_block`` columns each."""

    heads: int
    half_block: int
    num_warps: int


def head_tile(heads: int, half: int, whole: bool) -> HeadTile:
    """The tile for tokens of ``heads`` heads of ``2 * half`` columns.

    ``whole``: a program holds all heads of its token, because they share one scale.

    Raises:
        InvalidArgument: a whole token too long for one program.
    """
    block = max(next_power_of_two(half), SHORTEST)
    tile_heads = next_power_of_two(heads)
    if not whole:
        tile_heads = min(tile_heads, max(1, 1024 // (2 * block)))
    elements = 2 * block * tile_heads
    if whole and elements > MAX_TOKEN:
        raise InvalidArgument(
            f"k: {heads} heads of {2 * half} columns share one scale, which exceeds {MAX_TOKEN}"
            " elements; use the serving mode"
        )
    return HeadTile(tile_heads, block, min(32, max(1, elements // 512)))


@triton.jit
def round(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def load_halves(x, token, stride, head, d, mask, HALF: tl.constexpr):
    """fp32 halves [HEADS, HALF_BLOCK] of the heads of one token."""
    at = x + token * stride[0] + head.to(tl.int64)[:, None] * stride[1] + d[None, :]
    x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def rotated(x1, x2, cos, sin, position, table_rows, d, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves rotated by the tables at ``position``, in DTYPE (spec 9)."""
    # Every head's lanes load their own copy, from L1: a tile of x's shape gets x's layout, where
    # a single row would cross shared memory and three barriers to reach it.
    at = position * HALF + d[None, :] + tl.zeros_like(x1).to(tl.int32)
    mask = (d < HALF)[None, :] & (position >= 0) & (position < table_rows)
    c = round(tl.load(cos + at, mask=mask, other=float("nan")).to(tl.float32), DTYPE)
    s = round(tl.load(sin + at, mask=mask, other=float("nan")).to(tl.float32), DTYPE)
    y1 = round(x1 * c, DTYPE) + round(-x2 * s, DTYPE)
    y2 = round(x2 * c, DTYPE) + round(x1 * s, DTYPE)
    return round(y1, DTYPE), round(y2, DTYPE)


@triton.jit
def quantized(x1, x2, mask, QMAX: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Codes of both halves and the scale of each head, [HEADS] (spec 2-4)."""
    # A position outside the table left NaN in the masked columns too.
    bits1 = tl.where(mask, numerics.magnitude_bits(x1), 0)
    bits2 = tl.where(mask, numerics.magnitude_bits(x2), 0)
    amax = tl.max(tl.maximum(bits1, bits2), axis=1)
    if PER_TOKEN:
        amax = tl.zeros_like(amax) + tl.max(amax, axis=0)
    scale = numerics.scale_of(amax, QMAX, False)
    keep = numerics.has_codes(amax, scale)[:, None]
    inverse = numerics.inverse_of(scale)[:, None]
    code1 = numerics.codes_of(x1, inverse, keep, QMAX, False)
    return code1, numerics.codes_of(x2, inverse, keep, QMAX, False), scale


@triton.jit
def store_halves(y, at, y1, y2, mask, HALF: tl.constexpr):
    tl.store(y + at, y1.to(y.dtype.element_ty), mask=mask)
    tl.store(y + at + HALF, y2.to(y.dtype.element_ty), mask=mask)


@triton.jit
def columns_of(code1, code2, column, HALF: tl.constexpr):
    """Columns of two halves at the indices ``column``."""
    low = tl.gather(code1, tl.minimum(column, HALF - 1), axis=1)
    high = tl.gather(code2, tl.maximum(column - HALF, 0), axis=1)
    return tl.where(column < HALF, low, high)


@triton.jit
def store_packed(
    codes, row, code1, code2, head_mask, HALF: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Two adjacent columns a byte (spec 8); ``row`` [HEADS]: first byte of each head."""
    if HALF % 2 == 0:
        # Pairs lie in one half and, after the split, in one lane.
        j = tl.arange(0, HALF_BLOCK // 2)
        at = codes + row[:, None] + j[None, :]
        mask = head_mask[:, None] & (j < HALF // 2)[None, :]
        even, odd = tl.split(tl.reshape(code1, (HEADS, HALF_BLOCK // 2, 2)))
        tl.store(at, ((even & 15) | ((odd & 15) << 4)).to(tl.uint8), mask=mask)
        even, odd = tl.split(tl.reshape(code2, (HEADS, HALF_BLOCK // 2, 2)))
        tl.store(at + HALF // 2, ((even & 15) | ((odd & 15) << 4)).to(tl.uint8), mask=mask)
    else:
        # One byte holds the last column of the first half and the first of the second.
        j = tl.arange(0, HALF_BLOCK)
        column = tl.minimum(2 * j, 2 * HALF - 2)[None, :] + tl.zeros_like(code1)
        even = columns_of(code1, code2, column, HALF)
        odd = columns_of(code1, code2, column + 1, HALF)
        byte = (even & 15) | ((odd & 15) << 4)
        mask = head_mask[:, None] & (j < HALF)[None, :]
        tl.store(codes + row[:, None] + j[None, :], byte.to(tl.uint8), mask=mask)
