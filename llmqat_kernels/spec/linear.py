"""Integer linears: spec 7 and 17. ``w`` is int8 codes [N, K] or packed uint8 [N, ceil(K / 2)]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .activation import silu_mul, silu_mul_quantize
from .int4 import unpack_int4
from .quantize import QUANTIZED_BITS, as_groups, dequantize, quantize


def weight_codes(w: Tensor, columns: int) -> Tensor:
    """int8 codes [..., K] of a weight, or of activations, that may be packed."""
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


def qat_matmul_backward_input(
    grad: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    group_size: int,
    dequantize: Callable[..., Tensor] = dequantize,
) -> Tensor:
    """dX [..., K] of grad [..., N], in grad's dtype (spec 7)."""
    return grad @ dequantize(w_codes, w_scale, group_size, grad.dtype)


def qat_matmul_backward_weight(
    grad: Tensor,
    a: Tensor,
    a_scale: Tensor,
    dtype: torch.dtype,
    dequantize: Callable[..., Tensor] = dequantize,
) -> Tensor:
    """dW [N, K] of grad [..., N] and the codes a [..., K], in ``dtype`` (spec 7)."""
    x = dequantize(a, a_scale, -1, grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    return (rows.T @ x.reshape(-1, x.shape[-1])).to(dtype)


def integer_group_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_multiplier: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    int_matmul: Callable[..., Tensor] = int_matmul,
) -> Tensor:
    """Codes a [..., K] times weight codes with integer group multipliers -> [..., N] (spec 18).

    a and w are int8 codes or packed uint8, w_multiplier uint8 [N, groups], w_scale fp32 [N].
    """
    columns = w_multiplier.shape[-1] * group_size
    a_groups = as_groups(weight_codes(a, columns), group_size)
    w_groups = as_groups(weight_codes(w, columns), group_size)
    acc = torch.zeros((*a.shape[:-1], w.shape[0]), dtype=torch.int32, device=a.device)
    for group in range(w_groups.shape[-2]):
        part = int_matmul(a_groups[..., group, :], w_groups[:, group, :].contiguous(), 8)
        acc += part * w_multiplier[:, group].to(torch.int32)
    y = acc.to(torch.float32) * (a_scale.unsqueeze(-1) * w_scale)
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


def qat_matmul(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_multiplier: Tensor | None,
    bias: Tensor | None,
    group_size: int = -1,
    ste_clip: float | None = None,
    quantized_matmul: Callable[..., Tensor] = quantized_matmul,
    integer_group_matmul: Callable[..., Tensor] = integer_group_matmul,
) -> Tensor:
    """``qat_linear`` on codes that the producer of x wrote and others share; x and ``weight`` are
    there for their gradients only (spec 7, 18).
    """
    if w_multiplier is not None:
        return integer_group_matmul(
            a, a_scale, w_codes, w_multiplier, w_scale, bias, group_size, x.dtype
        )
    return quantized_matmul(a, a_scale, w_codes, w_scale, bias, 8, group_size, x.dtype)


def silu_mul_qat_matmul(
    gate: Tensor,
    up: Tensor,
    a_bits: int,
    weight: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    w_multiplier: Tensor | None,
    bias: Tensor | None,
    group_size: int = -1,
    ste_clip: float | None = None,
    silu_mul_quantize: Callable[..., tuple[Tensor, Tensor]] = silu_mul_quantize,
    qat_matmul: Callable[..., Tensor] = qat_matmul,
) -> Tensor:
    """``qat_matmul(silu_mul_quantize(gate, up))``; only the gradient differs in what it keeps (spec
    19).
    """
    a, a_scale = silu_mul_quantize(gate, up, a_bits)
    return qat_matmul(gate, a, a_scale, weight, w_codes, w_scale, w_multiplier, bias, group_size)


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


def repacked_matmul_silu_mul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
    dtype: torch.dtype,
    repacked_matmul: Callable[..., Tensor] = repacked_matmul,
    silu_mul: Callable[..., Tensor] = silu_mul,
) -> Tensor:
    """``silu_mul`` of the halves of ``repacked_matmul``: the weight is gates, then ups -> [...,
    n / 2] (spec 7, 14).
    """
    y = repacked_matmul(a, a_scale, w, w_scale, bias, n, w_bits, group_size, dtype)
    gate, up = y.split(n // 2, -1)
    return silu_mul(gate, up)


def repacked_matmul_add(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    n: int,
    w_bits: int,
    group_size: int,
    repacked_matmul: Callable[..., Tensor] = repacked_matmul,
) -> Tensor:
    """``residual`` [..., n] plus ``repacked_matmul`` in its dtype (spec 7)."""
    y = repacked_matmul(a, a_scale, w, w_scale, bias, n, w_bits, group_size, residual.dtype)
    return residual + y


def repacked_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
) -> Tensor:
    """The A16 form of ``quantized_linear`` on a weight laid out by ``repack_weight`` (spec 7)."""
    return quantized_linear(x, w, w_scale, bias, w_bits, 16, group_size)


def repacked_linear_add(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    n: int,
    w_bits: int,
    group_size: int,
    repacked_linear: Callable[..., Tensor] = repacked_linear,
) -> Tensor:
    """``residual`` [..., n] in x's dtype plus ``repacked_linear`` (spec 7)."""
    return residual + repacked_linear(x, w, w_scale, bias, n, w_bits, group_size)


def float_matmul(x: Tensor, w: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """fp32 product of x [..., K] and a float weight [n, K] in ``repack_weight``'s layout (spec
    17).
    """
    y = x.to(torch.float32) @ w.to(torch.float32).T
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
