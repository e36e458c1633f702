"""Integer linears on weights laid out for this backend.

Math:     spec 7, 8. A byte is ``16 * high + low`` as a signed number, of two channels at one k:
          high of channel c < half, low of channel c + half, half = ceil(N / 2). Two products, of
          the byte and of ``16 * low``, give both sums: ``(raw - low) / 16`` and ``low16 / 16``.
Shapes:   codes [N, K] -> bytes [half, K up to a multiple of 16] (2..4 bits), [N, ...] (5..8 bits),
          stored flat; y [..., N].
Dtypes:   int8 a, uint8 bytes, fp32 scales; y and bias fp32, fp16 or bf16.
Tiling:   matmul_tiles.PAIRS; one program owns both halves, so that [gate; up] meet in one program.
Cost:     as many tensor operations as int8, half the bytes; one shift and one mask for 8 weights.
          The raw byte needs nothing, and 16 * low goes from registers into wgmma (gemm).
Numerics: exact: |16 * high + low| <= 119 and 119 * 127 * 131,071 < 2^31.
Edges:    a missing low channel and columns beyond K hold code 0.
Limits:   codes in [-7, 7]; K <= 131,071; float weights (16, 32 bits) keep their layout. A16
          (repacked_linear) is plain torch on the dequantized weight (2x rule).
Tests:    tests/triton/test_repacked_matmul.py, tests/kernels/test_quantized_linear.py
Bench:    python -m benchmarks.run --op repacked_matmul --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InvalidArgument
from ...spec.int4 import unpack_int4
from ...spec.quantize import qmax
from . import gemm
from .launch import ALIGNMENT, Variant, empty, launch, unaligned
from .matmul_tiles import (
    GROUP,
    GROUP_PAIRS,
    PAIRS,
    Tile,
    group_steps,
    group_tile,
    irregular_tile,
    pair_tile,
)
from .quantized_linear import (
    RESULTS,
    all_aligned,
    code_product,
    empty_sum,
    form,
    group_forms,
    grouped_product,
    own_bias,
    quantized_linear,
    token_count,
)
from .tiles import architecture, bucket, tile_for

PAIRED_BITS = 4
"""Widest codes of which two share a byte."""
ROW_ALIGNMENT = 16
"""Bytes of one load; every row begins at a multiple of it."""


@triton.jit
def _both_products(w_at, a_at, left, raw, low, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One step of both accumulators."""
    pairs = gemm.load_columns(w_at, left, EVEN_K, BLOCK_K)
    codes = tl.trans(gemm.load_columns(a_at, left, EVEN_K, BLOCK_K))
    raw = tl.dot(pairs, codes, raw, out_dtype=tl.int32)
    low = tl.dot(gemm.low_nibbles_times_16(pairs), codes, low, out_dtype=tl.int32)
    return raw, low


@triton.jit(do_not_specialize=["m"])
def pair_matmul_kernel(
    a, a_scale, w, w_scale, bias, y, m, n, k, w_stride, half,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    w_tile, a_tile = gemm.tile_of(tl.cdiv(half, BLOCK_N), tl.cdiv(m, BLOCK_M), GROUP)
    rows, tokens = gemm.rows_of(w_tile, BLOCK_N), gemm.rows_of(a_tile, BLOCK_M)
    w_at = gemm.row_pointers(w, rows, half, w_stride, BLOCK_K)
    a_at = gemm.row_pointers(a, tokens, m, k, BLOCK_K)
    raw = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    low = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for done in range(0, k, BLOCK_K):
        raw, low = _both_products(w_at, a_at, k - done, raw, low, EVEN_K, BLOCK_K)
        w_at += BLOCK_K
        a_at += BLOCK_K
    low = low >> 4
    high = (raw - low) >> 4
    sx = gemm.scales_of(a_scale, tokens, m)
    result = high.to(tl.float32) * (sx[None, :] * gemm.scales_of(w_scale, rows, half)[:, None])
    gemm.store_results(y, result, bias, rows, tokens, half, n, m)
    rows += half
    result = low.to(tl.float32) * (sx[None, :] * gemm.scales_of(w_scale, rows, n)[:, None])
    gemm.store_results(y, result, bias, rows, tokens, n, n, m)


@triton.jit(do_not_specialize=["m", "groups"])
def grouped_pair_matmul_kernel(
    a, a_scale, w, w_scale, bias, y, m, n, k, w_stride, half, groups, group_size,
    STEPS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    w_tile, a_tile = gemm.tile_of(tl.cdiv(half, BLOCK_N), tl.cdiv(m, BLOCK_M), GROUP)
    rows, tokens = gemm.rows_of(w_tile, BLOCK_N), gemm.rows_of(a_tile, BLOCK_M)
    w_at = gemm.row_pointers(w, rows, half, w_stride, BLOCK_K)
    a_at = gemm.row_pointers(a, tokens, m, k, BLOCK_K)
    sx = gemm.scales_of(a_scale, tokens, m)[None, :]
    high_total = gemm.no_terms(BLOCK_N, BLOCK_M)
    low_total = gemm.no_terms(BLOCK_N, BLOCK_M)
    for group in range(groups):
        raw = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        low = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        if STEPS == 1:
            raw, low = _both_products(w_at, a_at, group_size, raw, low, WHOLE, BLOCK_K)
        else:
            for step in range(STEPS):
                at = step * BLOCK_K
                raw, low = _both_products(
                    w_at + at, a_at + at, group_size - at, raw, low, WHOLE, BLOCK_K
                )
        low = low >> 4
        high = (raw - low) >> 4
        high_at, low_at = rows * groups + group, (rows + half) * groups + group
        high_scale = tl.load(w_scale + high_at, mask=rows < half, other=0.0)
        low_scale = tl.load(w_scale + low_at, mask=rows + half < n, other=0.0)
        high_total = high_total + high.to(tl.float32) * (sx * high_scale[:, None])
        low_total = low_total + low.to(tl.float32) * (sx * low_scale[:, None])
        w_at += group_size
        a_at += group_size
    gemm.store_results(y, high_total, bias, rows, tokens, half, n, m)
    gemm.store_results(y, low_total, bias, rows + half, tokens, n, n, m)


def repack_weight(w: Tensor, w_bits: int) -> Tensor:
    """See spec 8. A load-time operator: it reads the codes once to check them.

    Raises:
        InvalidArgument: 4-bit codes outside [-7, 7].
    """
    if w.is_floating_point():
        return w.clone(memory_format=torch.contiguous_format)
    codes = unpack_int4(w, 2 * w.shape[1]) if w.dtype == torch.uint8 else w
    n, k = codes.shape
    if w_bits <= PAIRED_BITS:
        limit = qmax(PAIRED_BITS)
        if codes.numel() and not bool(((codes >= -limit) & (codes <= limit)).all()):
            raise InvalidArgument(
                f"w: a code does not fit {PAIRED_BITS} bits (-{limit}..{limit}); pass w_bits=8"
            )
        half = (n + 1) // 2
        low = torch.nn.functional.pad(codes[half:], (0, 0, 0, 2 * half - n))
        codes = codes[:half] * 16 + low
    padded = empty((codes.shape[0], aligned(k)), torch.int8, w.device)
    padded[:, :k] = codes
    padded[:, k:] = 0
    return padded.view(torch.uint8).flatten()


def aligned(k: int) -> int:
    """Bytes from one stored row to the next."""
    return -(-k // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _stored(w: Tensor, n: int, k: int, w_bits: int) -> Tensor:
    """The bytes of a weight as int8 [rows, stride], checked."""
    rows = (n + 1) // 2 if w_bits <= PAIRED_BITS else n
    if w.dtype != torch.uint8 or w.dim() != 1 or w.numel() != rows * aligned(k):
        raise InvalidArgument(
            f"w: {w.dtype} {tuple(w.shape)} is no {w_bits}-bit weight [{n}, {k}] of repack_weight;"
            " lay it out with backend 'triton'"
        )
    return w.view(torch.int8).view(rows, aligned(k))


def laid_out_codes(w: Tensor, n: int, k: int, w_bits: int) -> Tensor:
    """The codes int8 [n, k] that `repack_weight` laid out: its inverse.

    Raises:
        InvalidArgument: as `repacked_matmul`.
    """
    stored = _stored(w, n, k, w_bits)[:, :k]
    if w_bits > PAIRED_BITS:
        return stored.contiguous()
    low = (stored << 4) >> 4
    return torch.cat(((stored - low) >> 4, low))[:n]


def repacked_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See spec 7.

    Raises:
        InvalidArgument: ``w`` is no weight that `repack_weight` laid out for n channels of K codes.
    """
    codes, stride = _stored(w, n, a.shape[-1], w_bits), aligned(a.shape[-1])
    if w_bits <= PAIRED_BITS:
        return pair_product(a, a_scale, codes, w_scale, bias, n, stride, group_size, dtype)
    if group_size == -1:
        return code_product(a, a_scale, codes, w_scale, bias, n, stride, False, dtype)
    return grouped_product(a, a_scale, codes, w_scale, bias, n, stride, False, group_size, dtype)


def repacked_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
) -> Tensor:
    """See spec 7, activations off: plain torch on the dequantized weight, as `quantized_linear`.

    Raises:
        InvalidArgument: as `repacked_matmul`.
    """
    codes = laid_out_codes(w, n, x.shape[-1], w_bits)
    return quantized_linear(x, codes, w_scale, bias, w_bits, 16, group_size)


def pair_product(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None,
    n: int, w_stride: int, group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``a @ w.T`` -> [..., n] of ``dtype`` for bytes of channel pairs, rows ``w_stride`` apart."""
    bias = own_bias(bias, dtype)
    a, a_scale, w, w_scale, bias = all_aligned(a, a_scale, w, w_scale, bias)
    m, k, half = token_count(a), a.shape[-1], (n + 1) // 2
    y = empty((*a.shape[:-1], n), dtype, a.device)
    if k == 0 and group_size > 0:
        return empty_sum(y, bias)
    arch = architecture(a.device)
    if group_size == -1:
        key = bucket(M=m, N=n, K=k)
        tile = tile_for("repacked_matmul", key, arch, pair_tile(m, half, arch))
        regular = (n | half | k) % ALIGNMENT == 0
        if not regular:
            tile = irregular_tile(PAIRS[arch])
        kernel: Any = pair_matmul_kernel
        sizes: tuple[int, ...] = (m, n, k, w_stride, half)
        constants: dict[str, Any] = {"EVEN_K": regular and k % tile.k == 0, "BLOCK_K": tile.k}
    else:
        block_k, steps, regular = group_steps(group_size, (n | half | k) % ALIGNMENT == 0)
        tile = group_tile(GROUP_PAIRS, m, half, arch, group_size, regular)
        if regular:
            key = bucket(M=m, N=n, K=k, k=str(block_k))
            tile = tile_for("grouped_repacked_matmul", key, arch, tile)
        kernel = grouped_pair_matmul_kernel
        sizes = (m, n, k, w_stride, half, k // group_size, group_size)
        constants = {"STEPS": steps, "WHOLE": regular, "BLOCK_K": block_k}
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(half, tile.n),)
    launch(
        kernel, grid, a, a_scale, w, w_scale, bias, y, *sizes, **constants,
        BLOCK_M=tile.m, BLOCK_N=tile.n, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        regular=regular,
    )  # fmt: skip
    return y


KERNELS: dict[str, Any] = {
    "repack_weight": repack_weight,
    "repacked_matmul": repacked_matmul,
    "repacked_linear": repacked_linear,
}
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "repacked_matmul": tuple(dict.fromkeys(PAIRS[80] + PAIRS[90])),
    "grouped_repacked_matmul": GROUP_PAIRS,
}


def variants(arch: int) -> Iterator[Variant]:
    """Every tile, per channel and in groups; weights of 5 to 8 bits take the kernels of
    quantized_linear.
    """
    sizes = ("m", "n", "k", "w_stride", "half")
    for dtype in RESULTS:
        for tile in PAIRS[arch]:
            yield form("pair_matmul", pair_matmul_kernel, tile, dtype, sizes, EVEN_K=True)
            yield form("pair_matmul tail", pair_matmul_kernel, tile, dtype, sizes, EVEN_K=False)
        tile = irregular_tile(PAIRS[arch])
        yield unaligned(form("pair_matmul", pair_matmul_kernel, tile, dtype, sizes, EVEN_K=False))
    yield from group_forms(
        "grouped_pair_matmul", grouped_pair_matmul_kernel, GROUP_PAIRS,
        (*sizes, "groups", "group_size"),
    )  # fmt: skip
