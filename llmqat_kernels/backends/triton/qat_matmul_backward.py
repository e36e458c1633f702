"""Gradients of the integer linears.

Math:     spec 7: dX = dY @ dequantize(W), dW = dY^T @ dequantize(X). Both are
          ``y[i, j] = sum_r g[i, r] * codes[r, j] * scale[r]``.
Shapes:   dY [..., N], W codes [N, K], scale [N] or [N, groups] -> dX [..., K];
          dY [..., N], X codes [..., K], scale [...] -> dW [N, K].
Dtypes:   dY fp32, fp16, bf16; int8 codes; dX in dY's dtype, dW in any.
Tiling:   matmul_tiles.BACKWARD; codes become numbers of dY's dtype in registers, one tile of 64 x
          128 for 256 rows of dY.
Cost:     2 M N K operations on tensor cores (HMMA, wgmma); codes are read as 1 byte, so that no
          dequantized weight or activation exists in memory.
Numerics: 3x rule. Each operand is what dequantize would write, sums are fp32; fp32 gradients are
          multiplied in fp32, never in TF32.
Edges:    rows and columns beyond the tensors are masked; an empty sum is 0.
Limits:   none but memory.
Tests:    tests/triton/test_qat_matmul_backward.py, tests/kernels/test_quantized_linear.py
Bench:    python -m benchmarks.run --op qat_matmul_backward_input --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm
from .launch import ALIGNMENT, Variant, aligned, empty, launch, unaligned
from .matmul_tiles import (
    BACKWARD,
    BACKWARD_FP32,
    BACKWARD_GATHERED,
    BACKWARD_IRREGULAR,
    BACKWARD_IRREGULAR_FP32,
    GROUP,
    Tile,
    choose,
)
from .tiles import architecture, bucket, tile_for


@triton.jit(do_not_specialize=["i_count", "r_count", "group_size", "groups"])
def float_matmul_codes_kernel(
    g, codes, scale, y, i_count, j_count, r_count, g_row, group_size, groups,
    TRANSPOSED: tl.constexpr, GATHERED: tl.constexpr, CODES_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    j_tile, i_tile = gemm.tile_of(tl.cdiv(j_count, BLOCK_J), tl.cdiv(i_count, BLOCK_I), GROUP)
    i, j = gemm.rows_of(i_tile, BLOCK_I), gemm.rows_of(j_tile, BLOCK_J)
    r = tl.arange(0, BLOCK_R)
    if TRANSPOSED:
        g_at = g + r[:, None].to(tl.int64) * g_row + i[None, :]
        g_step = BLOCK_R * g_row
    else:
        g_at = gemm.row_pointers(g, i, i_count, g_row, BLOCK_R)
        g_step = BLOCK_R
    codes_at = codes + r[:, None].to(tl.int64) * j_count + j[None, :]
    if GATHERED:
        scale_at = scale + r[:, None].to(tl.int64) * groups + (j // group_size)[None, :]
    else:
        # One group holds all columns of a tile, and the only group of a row holds them all.
        scale_at = scale + r.to(tl.int64) * groups + j_tile * BLOCK_J // group_size
    if CODES_FIRST:
        acc = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    else:
        acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for done in range(0, r_count, BLOCK_R):
        # The same number, of which the compiler knows more where it is a row's length.
        left = (r_count if TRANSPOSED else g_row) - done
        if EVEN:
            g_tile = tl.load(g_at)
            tile = tl.load(codes_at)
            s = tl.load(scale_at)
        else:
            inside = (r < left)[:, None] & (j < j_count)[None, :]
            tile = tl.load(codes_at, mask=inside, other=0)
            if TRANSPOSED:
                in_g = (r < left)[:, None] & (i < g_row)[None, :]
                g_tile = tl.load(g_at, mask=in_g, other=0.0)
            else:
                g_tile = tl.load(g_at, mask=(r < left)[None, :], other=0.0)
            if GATHERED:
                s = tl.load(scale_at, mask=inside, other=0.0)
            else:
                s = tl.load(scale_at, mask=r < left, other=0.0)
        if not GATHERED:
            s = s[:, None]
        numbers = (tile.to(tl.float32) * s).to(g_tile.dtype)
        if TRANSPOSED:
            g_tile = tl.trans(g_tile)
        if CODES_FIRST:
            first, second = tl.trans(numbers), tl.trans(g_tile)
        else:
            first, second = g_tile, numbers
        acc = tl.dot(first, second, acc, input_precision="ieee")
        g_at += g_step
        codes_at += BLOCK_R * j_count
        scale_at += BLOCK_R * groups
    result = acc.to(y.dtype.element_ty)
    if CODES_FIRST:
        mask = (j < j_count)[:, None] & (i < i_count)[None, :]
        tl.store(y + i[None, :] * j_count + j[:, None], result, mask=mask)
    else:
        mask = (i < i_count)[:, None] & (j < j_count)[None, :]
        tl.store(y + i[:, None] * j_count + j[None, :], result, mask=mask)


def _product(
    op: str, grad: Tensor, codes: Tensor, scale: Tensor, y: Tensor, transposed: bool,
    group_size: int,
) -> Tensor:  # fmt: skip
    """``y = grad @ dequantize(codes)``, or ``grad.T @ dequantize(codes)``; all are matrices."""
    i_count, j_count = y.shape
    r_count = codes.shape[0]
    arch = architecture(grad.device)
    fp32 = grad.dtype == torch.float32
    default = choose(BACKWARD_FP32 if fp32 else BACKWARD[arch], i_count, j_count, arch)
    key = bucket(M=i_count, N=j_count, K=r_count, dtype="fp32" if fp32 else "16")
    tile = tile_for(op, key, arch, default)
    regular = (j_count | grad.shape[1]) % ALIGNMENT == 0
    if not regular:
        tile = BACKWARD_IRREGULAR_FP32 if fp32 else BACKWARD_IRREGULAR
    whole_groups = group_size == -1 or group_size % tile.n == 0
    if regular and not whole_groups and not fp32:
        tile = BACKWARD_GATHERED[arch]
    even = regular and r_count % tile.k == 0 and j_count % tile.n == 0
    grid = (triton.cdiv(i_count, tile.m) * triton.cdiv(j_count, tile.n),)
    launch(
        float_matmul_codes_kernel, grid, grad, codes, scale, y,
        i_count, j_count, r_count, grad.shape[1],
        j_count if group_size == -1 else group_size, scale.numel() // max(r_count, 1),
        TRANSPOSED=transposed, GATHERED=not whole_groups, CODES_FIRST=arch < 90 and not fp32,
        EVEN=even and (not transposed or i_count % tile.m == 0),
        BLOCK_I=tile.m, BLOCK_J=tile.n, BLOCK_R=tile.k, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, regular=regular,
    )  # fmt: skip
    return y


def qat_matmul_backward_input(
    grad: Tensor, w_codes: Tensor, w_scale: Tensor, group_size: int
) -> Tensor:
    """See spec 7."""
    k = w_codes.shape[1]
    rows = grad.shape[:-1]
    dx = empty((rows.numel(), k), grad.dtype, grad.device)
    grad = aligned(grad.reshape(rows.numel(), grad.shape[-1]))
    _product(
        "qat_matmul_backward_input", grad, aligned(w_codes), aligned(w_scale), dx, False,
        group_size,
    )  # fmt: skip
    return dx.view(*rows, k)


def qat_matmul_backward_weight(
    grad: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """See spec 7."""
    rows = grad.shape[:-1].numel()
    n, k = grad.shape[-1], a.shape[-1]
    # Sums are fp32: what is neither that nor the gradient's dtype is cast from it.
    stored = dtype if dtype == grad.dtype else torch.float32
    dw = empty((n, k), stored, grad.device)
    return _product(
        "qat_matmul_backward_weight", aligned(grad.reshape(rows, n)),
        aligned(a.reshape(rows, k)), aligned(a_scale), dw, True, -1,
    ).to(dtype)  # fmt: skip


KERNELS: dict[str, Any] = {
    "qat_matmul_backward_input": qat_matmul_backward_input,
    "qat_matmul_backward_weight": qat_matmul_backward_weight,
}
CANDIDATES: dict[str, tuple[Tile, ...]] = dict.fromkeys(
    KERNELS, tuple(dict.fromkeys(BACKWARD[80] + BACKWARD[90]))
)


FORMS = (
    ("input", {"TRANSPOSED": False, "GATHERED": False}),
    ("input groups", {"TRANSPOSED": False, "GATHERED": True}),
    ("weight", {"TRANSPOSED": True, "GATHERED": False}),
)
SIZES = dict.fromkeys(("i_count", "j_count", "r_count", "g_row", "group_size", "groups"), "i32")


def _variant(
    name: str, kind: str, output: str, tile: Tile, codes_first: bool, **flags: bool
) -> Variant:
    return Variant(
        f"backward {name} {kind} to {output} {tile.m}x{tile.n}x{tile.k}",
        float_matmul_codes_kernel,
        {"g": f"*{kind}", "codes": "*i8", "scale": "*fp32", "y": f"*{output}", **SIZES},
        {**flags, "CODES_FIRST": codes_first, "BLOCK_I": tile.m, "BLOCK_J": tile.n,
         "BLOCK_R": tile.k, "GROUP": GROUP},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        promises=frozenset() if kind == "fp32" else frozenset({"float_mma"}),
    )  # fmt: skip


def variants(arch: int) -> Iterator[Variant]:
    """Every tile and dtype for both gradients, group scales, and tensors that tiles do not fill."""
    for name, flags in FORMS:
        for kind in ("fp32", "fp16", "bf16"):
            fp32 = kind == "fp32"
            first = arch < 90 and not fp32
            for output in sorted({kind, "fp32"}) if flags["TRANSPOSED"] else [kind]:
                halves = (BACKWARD_GATHERED[arch],) if flags["GATHERED"] else BACKWARD[arch]
                for tile in BACKWARD_FP32 if fp32 else halves:
                    yield _variant(name, kind, output, tile, first, **flags, EVEN=True)
                    yield _variant(f"{name} tail", kind, output, tile, first, **flags, EVEN=False)
                tile = BACKWARD_IRREGULAR_FP32 if fp32 else BACKWARD_IRREGULAR
                yield unaligned(_variant(name, kind, output, tile, first, **flags, EVEN=False))
