"""Integer linears on int8 or plainly packed 4-bit weight codes.

Math:     spec 7, 8.
Shapes:   a [..., K] x w [N, K] (packed: [N, ceil(K / 2)]) -> y [..., N].
Dtypes:   int8 codes, int32 sums, fp32 scales; y and bias fp32, fp16 or bf16.
Tiling:   matmul_tiles; weights are the first operand (gemm). Packed nibbles become bytes of 16
          times the code, 2 instructions for 4 codes and 2 byte permutations; the sum is shifted
          back. repack_weight's layout needs no permutation: use it for weights that stay.
Cost:     2 M N K operations on int8 tensor cores (IMMA, wgmma), one read of w for 8 token tiles.
Numerics: exact, any tile, any batch: integers; then fp32 products as spec 7 orders them. Groups
          add fp32 terms in order, from -0 so that the first term keeps its sign.
Edges:    rows beyond N and M read the last row and are not stored; columns beyond K are 0.
Limits:   K <= 131,071. A16 is plain torch on the dequantized weight (2x rule).
Tests:    tests/kernels/test_quantized_linear.py, tests/triton/test_quantized_linear.py
Bench:    python -m benchmarks.run --op quantized_matmul --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.int4 import unpack_int4
from ...spec.quantize import QUANTIZED_BITS
from . import gemm
from .launch import ALIGNMENT, TRITON_TYPES, Variant, aligned, empty, launch, unaligned
from .matmul_tiles import (
    CODES,
    GROUP,
    GROUPS,
    Tile,
    code_tile,
    group_steps,
    group_tile,
    irregular_tile,
)
from .quantize import quantize
from .tiles import architecture, bucket, tile_for


@triton.jit(do_not_specialize=["m"])
def int8_matmul_kernel(
    a, a_scale, w, w_scale, bias, y, m, n, k, w_stride,
    PACKED: tl.constexpr, SCALED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    w_tile, a_tile = gemm.tile_of(tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), GROUP)
    rows, tokens = gemm.rows_of(w_tile, BLOCK_N), gemm.rows_of(a_tile, BLOCK_M)
    W_COLUMNS: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    w_at = gemm.row_pointers(w, rows, n, w_stride, W_COLUMNS)
    a_at = gemm.row_pointers(a, tokens, m, k, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for done in range(0, k, BLOCK_K):
        weights = gemm.load_weights(w_at, k - done, PACKED, EVEN_K, BLOCK_K)
        codes = gemm.load_columns(a_at, k - done, EVEN_K, BLOCK_K)
        acc = tl.dot(weights, tl.trans(codes), acc, out_dtype=tl.int32)
        w_at += W_COLUMNS
        a_at += BLOCK_K
    if PACKED:
        acc = acc >> 4
    if SCALED:
        sx = gemm.scales_of(a_scale, tokens, m)
        sw = gemm.scales_of(w_scale, rows, n)
        result = acc.to(tl.float32) * (sx[None, :] * sw[:, None])
        gemm.store_results(y, result, bias, rows, tokens, n, n, m)
    else:
        gemm.store_results(y, acc, None, rows, tokens, n, n, m)


@triton.jit(do_not_specialize=["m", "groups"])
def grouped_matmul_kernel(
    a, a_scale, w, w_scale, bias, y, m, n, k, w_stride, groups, group_size,
    PACKED: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    w_tile, a_tile = gemm.tile_of(tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), GROUP)
    rows, tokens = gemm.rows_of(w_tile, BLOCK_N), gemm.rows_of(a_tile, BLOCK_M)
    W_COLUMNS: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    w_at = gemm.row_pointers(w, rows, n, w_stride, W_COLUMNS)
    a_at = gemm.row_pointers(a, tokens, m, k, BLOCK_K)
    sx = gemm.scales_of(a_scale, tokens, m)
    total = gemm.no_terms(BLOCK_N, BLOCK_M)
    for group in range(groups):
        part = gemm.group_product(
            a_at, w_at, group_size, PACKED, STEPS, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K
        )
        sw = tl.load(w_scale + rows * groups + group, mask=rows < n, other=0.0)
        total = total + part.to(tl.float32) * (sx[None, :] * sw[:, None])
        w_at += group_size // 2 if PACKED else group_size
        a_at += group_size
    gemm.store_results(y, total, bias, rows, tokens, n, n, m)


def all_aligned(*tensors: Tensor | None) -> list[Any]:
    """The tensors, each `aligned`; None stays None."""
    return [None if tensor is None else aligned(tensor) for tensor in tensors]


def own_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias of the result's dtype or of fp32, which holds every value of the third."""
    kept = bias is None or bias.dtype in (dtype, torch.float32)
    return bias if kept or bias is None else bias.to(torch.float32)


def token_count(a: Tensor) -> int:
    """Rows of a [..., K]."""
    return a.shape[:-1].numel()


def empty_sum(y: Tensor, bias: Tensor | None) -> Tensor:
    """y = 0 (+ bias): what a sum of no groups gives, whatever the scales."""
    return y.zero_() if bias is None else y.copy_(0.0 + bias.to(torch.float32))


def code_product(
    a: Tensor, a_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, bias: Tensor | None,
    n: int, w_stride: int, packed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``a @ w.T`` -> [..., n] of ``dtype``: int32 sums, or scaled if there are scales.

    w is int8 codes (or plainly packed bytes as int8), rows ``w_stride`` bytes apart.
    """
    bias = own_bias(bias, dtype)
    a, a_scale, w, w_scale, bias = all_aligned(a, a_scale, w, w_scale, bias)
    m, k = token_count(a), a.shape[-1]
    y = empty((*a.shape[:-1], n), dtype, a.device)
    arch = architecture(a.device)
    key = bucket(M=m, N=n, K=k, w="packed" if packed else "int8")
    tile = tile_for("quantized_matmul", key, arch, code_tile(m, n, arch))
    regular = (n | k | w_stride) % ALIGNMENT == 0
    if not regular:
        tile = irregular_tile(CODES[arch])
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    launch(
        int8_matmul_kernel, grid, a, a_scale, w, w_scale, bias, y, m, n, k, w_stride,
        PACKED=packed, SCALED=a_scale is not None,
        EVEN_K=regular and k % tile.k == 0,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, regular=regular,
    )  # fmt: skip
    return y


def grouped_product(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None,
    n: int, w_stride: int, packed: bool, group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`code_product` of weights with scales [n, groups]."""
    bias = own_bias(bias, dtype)
    a, a_scale, w, w_scale, bias = all_aligned(a, a_scale, w, w_scale, bias)
    m, k = token_count(a), a.shape[-1]
    y = empty((*a.shape[:-1], n), dtype, a.device)
    if k == 0:
        return empty_sum(y, bias)
    arch = architecture(a.device)
    block_k, steps, regular = group_steps(group_size, (n | k | w_stride) % ALIGNMENT == 0)
    tile = group_tile(GROUPS, m, n, arch, group_size, regular)
    if regular:
        key = bucket(M=m, N=n, K=k, k=str(block_k))
        tile = tile_for("grouped_matmul", key, arch, tile)
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    launch(
        grouped_matmul_kernel, grid, a, a_scale, w, w_scale, bias, y, m, n, k, w_stride,
        k // group_size, group_size, PACKED=packed, STEPS=steps, WHOLE=regular,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=block_k, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, regular=regular,
    )  # fmt: skip
    return y


def stored_codes(w: Tensor, k: int, group_size: int = -1) -> tuple[Tensor, bool]:
    """The bytes of a weight as int8, and whether they are packed.

    A group of odd length would begin inside a byte: such weights are unpacked first.
    """
    if w.dtype != torch.uint8:
        return w, False
    if group_size > 0 and group_size % 2:
        return unpack_int4(w, k), False
    return w.view(torch.int8), True


def int_matmul(a: Tensor, w: Tensor, w_bits: int) -> Tensor:
    """See spec 7: the int32 sums."""
    codes, packed = stored_codes(w, a.shape[-1])
    return code_product(a, None, codes, None, None, w.shape[0], codes.shape[1], packed, torch.int32)


def quantized_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See spec 7."""
    n = w.shape[0]
    if group_size == -1:
        codes, packed = stored_codes(w, a.shape[-1])
        return code_product(a, a_scale, codes, w_scale, bias, n, codes.shape[1], packed, dtype)
    codes, packed = stored_codes(w, a.shape[-1], group_size)
    return grouped_product(
        a, a_scale, codes, w_scale, bias, n, codes.shape[1], packed, group_size, dtype
    )


def quantized_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_bits: int,
    a_bits: int,
    group_size: int = -1,
) -> Tensor:
    """See spec 7."""
    if a_bits in QUANTIZED_BITS:
        a, a_scale = quantize(x, a_bits)
        return quantized_matmul(a, a_scale, w, w_scale, bias, w_bits, group_size, x.dtype)
    codes = unpack_int4(w, x.shape[-1]) if w.dtype == torch.uint8 else w
    dense = torch.ops.llmqat.dequantize(codes, w_scale, group_size, x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def qat_linear(
    x: Tensor,
    weight: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    a_bits: int,
    group_size: int = -1,
    ste_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec 7: the product, and the codes and scales of x for the gradient."""
    a, a_scale = quantize(x, a_bits)
    y = quantized_matmul(a, a_scale, w_codes, w_scale, bias, 8, group_size, x.dtype)
    return y, a, a_scale


KERNELS: dict[str, Any] = {
    "int_matmul": int_matmul,
    "quantized_matmul": quantized_matmul,
    "quantized_linear": quantized_linear,
    "qat_linear": qat_linear,
}
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "quantized_matmul": tuple(dict.fromkeys(CODES[80] + CODES[90])),
    "grouped_matmul": GROUPS,
}


def form(
    name: str, kernel: Any, tile: Tile, dtype: torch.dtype, sizes: tuple[str, ...], **constants: Any
) -> Variant:  # fmt: skip
    """A variant of an integer matmul kernel that writes ``dtype``; ``sizes``: integer arguments.

    The bias is a vector that is added at the end: its dtype makes no form of its own.
    """
    kind = f"*{TRITON_TYPES[dtype]}"
    signature = {"a": "*i8", "w": "*i8", "y": kind}
    if dtype == torch.int32:
        constants |= {"a_scale": None, "w_scale": None, "bias": None}
    else:
        signature |= {"a_scale": "*fp32", "w_scale": "*fp32", "bias": kind}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP}
    return Variant(
        f"{name} {TRITON_TYPES[dtype]} {tile.m}x{tile.n}x{tile.k}",
        kernel,
        signature | dict.fromkeys(sizes, "i32"),
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        promises=frozenset({"int8_mma"}),
    )


def group_forms(
    name: str, kernel: Any, tiles: Sequence[Tile], sizes: tuple[str, ...], **constants: Any
) -> Iterator[Variant]:
    """Every form of a matmul of weights in groups."""
    for group_size in GROUP_SIZES:
        block_k, steps, whole = group_steps(group_size)
        flags = constants | {"STEPS": steps, "WHOLE": whole}
        for dtype in RESULTS:
            for tile in tiles if whole else tiles[-1:]:
                sized = replace(tile, k=block_k)
                variant = form(f"{name} {group_size}", kernel, sized, dtype, sizes, **flags)
                yield variant if whole else unaligned(variant)


RESULTS = (torch.float32, torch.float16, torch.bfloat16)
GROUP_SIZES = (32, 64, 128, 256, 16, 48, 100)
"""One for each kind of step: a whole one of each length, several, and the same padded, which also
serve whole groups in rows that begin anywhere."""


def variants(arch: int) -> Iterator[Variant]:
    """Every tile, for int8 and packed codes, per channel and for each kind of group."""
    sizes = ("m", "n", "k", "w_stride")
    for packed, codes in ((False, "int8"), (True, "packed")):
        for dtype in (*RESULTS, torch.int32):
            flags = {"PACKED": packed, "SCALED": dtype != torch.int32}
            for tile in CODES[arch]:
                for even, name in ((True, ""), (False, " tail")):
                    yield form(
                        f"int8_matmul {codes}{name}", int8_matmul_kernel, tile, dtype, sizes,
                        **flags, EVEN_K=even,
                    )  # fmt: skip
            variant = form(
                f"int8_matmul {codes}", int8_matmul_kernel, irregular_tile(CODES[arch]), dtype,
                sizes, **flags, EVEN_K=False,
            )  # fmt: skip
            yield unaligned(variant)
        yield from group_forms(
            f"grouped_matmul {codes}", grouped_matmul_kernel, GROUPS,
            (*sizes, "groups", "group_size"), PACKED=packed,
        )  # fmt: skip
