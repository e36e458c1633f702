"""Integer linears: spec 7 and 17. ``w`` is int8 codes [N, K] or packed uint8 [N, ceil(K / 2)]."""

from __future__ import annotations

import torch
from torch import Tensor

from .int4 import unpack_int4
from .quantize import QUANTIZED_BITS, as_groups, dequantize, quantize


def weight_codes(w: Tensor, columns: int) -> Tensor:
    """int8 codes [N, K] of a weight that may be packed."""
    return unpack_int4(w, columns) if w.dtype == torch.uint8 else w


def int_matmul(a: Tensor, w: Tensor, w_bits: int) -> Tensor:
    """Exact accumulators ``a @ w.T``: int8 [..., K] x [N, K] -> int32 [..., N]."""
    codes = weight_codes(w, a.shape[-1])
    # fp64 holds every partial sum exactly (|sum| <= 131071 * 127^2 < 2^53) and has a fast GEMM.
    return (a.to(torch.float64) @ codes.to(torch.float64).T).to(torch.int32)


def _grouped_product(
    a: Tensor, a_scale: Tensor, codes: Tensor, w_scale: Tensor, group_size: int
) -> Tensor:
    total: Tensor | None = None
    a_groups, w_groups = as_groups(a, group_size), as_groups(codes, group_size)
    for group in range(w_groups.shape[-2]):
        acc = int_matmul(a_groups[..., group, :], w_groups[:, group, :], 8).to(torch.float32)
        term = acc * (a_scale.unsqueeze(-1) * w_scale[:, group])
        total = term if total is None else total + term
    if total is None:
        return a_scale.new_zeros((*a.shape[:-1], codes.shape[0]))
    return total


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
    """Codes a [..., K] with scales [...] times weight codes -> ``dtype`` [..., N] (spec 7)."""
    codes = weight_codes(w, a.shape[-1])
    if group_size == -1:
        y = int_matmul(a, codes, w_bits).to(torch.float32) * (a_scale.unsqueeze(-1) * w_scale)
    else:
        y = _grouped_product(a, a_scale, codes, w_scale, group_size)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)


def quantized_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_bits: int,
    a_bits: int,
    group_size: int = -1,
) -> Tensor:
    """Float x [..., K] -> [..., N] in x's dtype; ``a_bits`` 16 or 32 is the float A16 form (spec
    7).
    """
    if a_bits in QUANTIZED_BITS:
        a, a_scale = quantize(x, a_bits)
        return quantized_matmul(a, a_scale, w, w_scale, bias, w_bits, group_size, x.dtype)
    weight = dequantize(weight_codes(w, x.shape[-1]), w_scale, group_size, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


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
    """Training forward: ``(y, x codes, x scale)``; ``weight`` is there for its gradient only (spec
    7).
    """
    a, a_scale = quantize(x, a_bits)
    return quantized_matmul(a, a_scale, w_codes, w_scale, bias, 8, group_size, x.dtype), a, a_scale


def repack_weight(w: Tensor, w_bits: int) -> Tensor:
    """The backend's own weight layout; the reference has none and keeps ``w`` (spec 8)."""
    return w.clone(memory_format=torch.contiguous_format)


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
    """``quantized_matmul`` on a weight laid out by ``repack_weight``."""
    return quantized_matmul(a, a_scale, w, w_scale, bias, w_bits, group_size, dtype)


def float_matmul(x: Tensor, w: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """fp32 product of x [..., K] and a float weight [n, K] in ``repack_weight``'s layout (spec
    17).
    """
    y = x.to(torch.float32) @ w.to(torch.float32).T
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
