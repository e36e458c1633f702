"""4-bit weights in groups whose scales are integer multiples of one scale a row.

Math:     spec 18.
Shapes:   x [R, C] -> codes [R, C], multiplier [R, C / group_size], scale [R];
          a [..., K] x w [N, K] (packed: [N, ceil(K / 2)]) -> y [..., N].
Dtypes:   fp32, fp16, bf16 in; int8 or packed codes, uint8 multipliers, fp32 scales.
Tiling:   quantize: a program a row, twice over its groups (the second time from the cache);
          product: matmul_tiles.GROUPS, a step is one group or a part of it.
Cost:     quantize reads x once and writes 1 byte an element; the product adds one integer
          multiply-add for each result and group to those of int8 (float groups: a conversion, two
          multiplications and an addition).
Numerics: exact, any tile, any batch: one int32 sum (K <= 38,342 is checked before).
Edges:    zero groups take multiplier 1; a row with NaN or infinity has scale NaN and codes 0.
Limits:   a group of quantize fits one program: 32,768 elements.
Tests:    tests/kernels/test_integer_groups.py, tests/triton/test_integer_groups.py
Bench:    python -m benchmarks.run --op integer_group_matmul --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InvalidArgument
from ...spec.linear import weight_codes
from ...spec.quantize import MAX_MULTIPLIER, qmax
from . import gemm, numerics
from .launch import ALIGNMENT, TRITON_TYPES, Variant, aligned, empty, launch, unaligned
from .matmul_tiles import GROUP, GROUPS, Tile, group_steps, group_tile
from .quantized_linear import (
    RESULTS,
    all_aligned,
    group_forms,
    own_bias,
    stored_codes,
    token_count,
)
from .row_tiles import SHORTEST, next_power_of_two
from .tiles import architecture, bucket, tile_for

MULTIPLIERS = tl.constexpr(MAX_MULTIPLIER)
CHUNK = 4096
"""Elements that a program of quantize_integer_groups holds, if a group is no longer."""
MAX_GROUP = 32_768


@triton.jit
def _load_groups(x, row, first, groups, group_size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 groups [CHUNK, BLOCK] of a row, their offsets, and masks of groups and elements."""
    group, column = first + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    present = group < groups
    mask = present[:, None] & (column < group_size)[None, :]
    at = row * (groups * group_size) + group[:, None] * group_size + column[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32), at, present, mask


@triton.jit(do_not_specialize=["groups"])
def quantize_integer_groups_kernel(
    x, codes, multiplier, scale, groups, group_size,
    QMAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros((1,), tl.int32)
    for first in range(0, groups, CHUNK):
        values, at, present, mask = _load_groups(x, row, first, groups, group_size, CHUNK, BLOCK)
        amax = tl.max(numerics.magnitude_bits(values), axis=1)
        fine = numerics.scale_of(amax, QMAX, False)
        zero = amax.to(tl.float32, bitcast=True) < numerics.ZERO_AMAX
        bits = tl.where(zero, 0, numerics.magnitude_bits(fine))
        top = tl.maximum(top, tl.max(bits, axis=0))
    largest = top.to(tl.float32, bitcast=True)
    s = tl.div_rn(largest, tl.full((1,), MULTIPLIERS, tl.float32))
    s = tl.where(top == 0, 1.0, s.to(tl.bfloat16).to(tl.float32))
    finite = top < numerics.INFINITY_BITS
    s = tl.where(finite, s, float("nan"))
    tl.store(scale + row + tl.arange(0, 1), s)
    step = tl.where(finite, s, 1.0)
    for first in range(0, groups, CHUNK):
        values, at, present, mask = _load_groups(x, row, first, groups, group_size, CHUNK, BLOCK)
        amax = tl.max(numerics.magnitude_bits(values), axis=1)
        nonzero = amax.to(tl.float32, bitcast=True) >= numerics.ZERO_AMAX
        fine = numerics.scale_of(amax, QMAX, False)
        fine = tl.where(finite & nonzero, fine, 0.0)  # the clamp must not see NaN
        steps = tl.div_rn(fine, tl.broadcast_to(step, (CHUNK,)))
        m = numerics.round_up(tl.minimum(tl.maximum(steps, 1.0), MULTIPLIERS))
        group_scale = m.to(tl.float32) * s
        keep = numerics.has_codes(amax, group_scale)
        code = numerics.codes_of(
            values, numerics.inverse_of(group_scale)[:, None], keep[:, None], QMAX, True
        )
        tl.store(codes + at, code.to(tl.int8), mask=mask)
        group = first + tl.arange(0, CHUNK)
        tl.store(multiplier + row * groups + group, m.to(tl.uint8), mask=present)


@triton.jit(do_not_specialize=["m", "groups"])
def integer_group_matmul_kernel(
    a, a_scale, w, w_multiplier, w_scale, bias, y, m, n, k, w_stride, groups, group_size,
    PACKED: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    w_tile, a_tile = gemm.tile_of(tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), GROUP)
    rows, tokens = gemm.rows_of(w_tile, BLOCK_N), gemm.rows_of(a_tile, BLOCK_M)
    W_COLUMNS: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    w_at = gemm.row_pointers(w, rows, n, w_stride, W_COLUMNS)
    a_at = gemm.row_pointers(a, tokens, m, k, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for group in range(groups):
        part = gemm.group_product(
            a_at, w_at, group_size, PACKED, STEPS, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K
        )
        factor = tl.load(w_multiplier + rows * groups + group, mask=rows < n, other=0)
        acc += part * factor.to(tl.int32)[:, None]
        w_at += group_size // 2 if PACKED else group_size
        a_at += group_size
    sx = gemm.scales_of(a_scale, tokens, m)
    sw = gemm.scales_of(w_scale, rows, n)
    result = acc.to(tl.float32) * (sx[None, :] * sw[:, None])
    gemm.store_results(y, result, bias, rows, tokens, n, n, m)


def group_chunk(group_size: int) -> tuple[int, int, int]:
    """(groups, padded group length, warps) of one step of quantize_integer_groups."""
    block = max(next_power_of_two(group_size), SHORTEST)
    chunk = max(1, CHUNK // block)
    return chunk, block, min(32, max(4, chunk * block // (32 * 32)))


def quantize_integer_groups(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See spec 18.

    Raises:
        InvalidArgument: a group too long for one program.
    """
    if group_size > MAX_GROUP:
        raise InvalidArgument(f"group_size: {group_size} exceeds {MAX_GROUP}; use smaller groups")
    x = aligned(x)
    lead, groups = tuple(x.shape[:-1]), x.shape[-1] // group_size
    codes = empty(tuple(x.shape), torch.int8, x.device)
    multiplier = empty((*lead, groups), torch.uint8, x.device)
    scale = empty(lead, torch.float32, x.device)
    chunk, block, warps = group_chunk(group_size)
    launch(
        quantize_integer_groups_kernel, (token_count(x),), x, codes, multiplier, scale,
        groups, group_size, QMAX=qmax(bits), CHUNK=chunk, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return codes, multiplier, scale


def integer_group_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_multiplier: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See spec 18. Packed activations become int8 first: Triton has no 4-bit dot."""
    k = w_multiplier.shape[-1] * group_size
    a = weight_codes(a, k)
    codes, packed = stored_codes(w, k, group_size)
    a, a_scale, codes, w_multiplier, w_scale, bias = all_aligned(
        a, a_scale, codes, w_multiplier, w_scale, own_bias(bias, dtype)
    )
    m, n = token_count(a), w.shape[0]
    y = empty((*a.shape[:-1], n), dtype, a.device)
    arch = architecture(a.device)
    regular = (n | k | codes.shape[1]) % ALIGNMENT == 0
    block_k, steps, regular = group_steps(group_size, regular)
    tile = group_tile(GROUPS, m, n, arch, group_size, regular)
    if regular:
        key = bucket(M=m, N=n, K=k, k=str(block_k))
        tile = tile_for("integer_group_matmul", key, arch, tile)
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    launch(
        integer_group_matmul_kernel, grid, a, a_scale, codes, w_multiplier, w_scale, bias, y,
        m, n, k, codes.shape[1], k // group_size, group_size,
        PACKED=packed, STEPS=steps, WHOLE=regular,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=block_k, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, regular=regular,
    )  # fmt: skip
    return y


KERNELS: dict[str, Any] = {
    "quantize_integer_groups": quantize_integer_groups,
    "integer_group_matmul": integer_group_matmul,
}
CANDIDATES: dict[str, tuple[Tile, ...]] = {"integer_group_matmul": GROUPS}


def variants(arch: int) -> Iterator[Variant]:
    """Every tile and kind of group."""
    for group_size in (32, 128, 4096, MAX_GROUP):
        chunk, block, warps = group_chunk(group_size)
        for dtype in RESULTS:
            name = TRITON_TYPES[dtype]
            variant = Variant(
                f"quantize_integer_groups {name} {group_size}",
                quantize_integer_groups_kernel,
                {
                    "x": f"*{name}", "codes": "*i8", "multiplier": "*u8", "scale": "*fp32",
                    "groups": "i32", "group_size": "i32",
                },
                {"QMAX": 7, "CHUNK": chunk, "BLOCK": block},
                num_warps=warps,
                promises=frozenset({"vector_loads"}),
            )  # fmt: skip
            yield variant
            yield unaligned(variant)
    sizes = ("m", "n", "k", "w_stride", "groups", "group_size")
    for packed, codes in ((False, "int8"), (True, "packed")):
        for variant in group_forms(
            f"integer_group_matmul {codes}", integer_group_matmul_kernel, GROUPS, sizes,
            PACKED=packed,
        ):  # fmt: skip
            yield replace(variant, signature={**variant.signature, "w_multiplier": "*u8"})
