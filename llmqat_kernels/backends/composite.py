"""Operators that every kernel backend composes of others, or leaves to plain torch.

Nothing here is a second home of a formula: each entry is a function of ``spec/``, with the inner
operators of the current backend in place of the reference's where they do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..spec import activation, distillation, int4, linear, norm, quantize

ops = torch.ops.llmqat


def rms_norm_quantize_train(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bits: int,
    residual: Tensor | None = None,
    values: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fused inference form, and y beside it where somebody reads it."""
    codes, scale, total = ops.rms_norm_quantize(x, weight, eps, bits, residual)
    if not values:
        return quantize.gradient_handle(x), codes, scale, total
    return ops.rms_norm(x if residual is None else total, weight, eps), codes, scale, total


def silu_mul_quantize_train(
    gate: Tensor, up: Tensor, bits: int, values: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused inference form, and y beside it where somebody reads it."""
    codes, scale = ops.silu_mul_quantize(gate, up, bits)
    return ops.silu_mul(gate, up) if values else quantize.gradient_handle(gate), codes, scale


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
) -> Tensor:
    """The inference form of the product; only the gradient tells them apart."""
    if w_multiplier is None:
        return ops.quantized_matmul(a, a_scale, w_codes, w_scale, bias, 8, group_size, x.dtype)
    return ops.integer_group_matmul(
        a, a_scale, w_codes, w_multiplier, w_scale, bias, group_size, x.dtype
    )


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
) -> Tensor:
    """The fused producer, then the inference form of the product."""
    a, a_scale = ops.silu_mul_quantize(gate, up, a_bits)
    return qat_matmul(gate, a, a_scale, weight, w_codes, w_scale, w_multiplier, bias, group_size)


def rope_fake_quantize(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
    ste_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotation and row quantizer, one after the other."""
    if bits not in quantize.QUANTIZED_BITS:
        return ops.rope(k, cos, sin, positions), v.clone()

    def through_cache(x: Tensor) -> Tensor:
        rows = x.flatten(1) if pre_rope else x
        return ops.fake_quantize(rows, bits, -1, None, False).reshape(x.shape)

    if pre_rope:
        return ops.rope(through_cache(k), cos, sin, positions), through_cache(v)
    return through_cache(ops.rope(k, cos, sin, positions)), through_cache(v)


def qat_matmul_backward_input(
    grad: Tensor, w_codes: Tensor, w_scale: Tensor, group_size: int
) -> Tensor:
    """A float product with the weight that the codes stand for."""
    return linear.qat_matmul_backward_input(grad, w_codes, w_scale, group_size, ops.dequantize)


def qat_matmul_backward_weight(
    grad: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """A float product with the activations that the codes stand for."""
    return linear.qat_matmul_backward_weight(grad, a, a_scale, dtype, ops.dequantize)


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
    """One integer product a group."""
    return linear.integer_group_matmul(
        a, a_scale, w, w_multiplier, w_scale, bias, group_size, dtype, ops.int_matmul
    )


COMPOSITES: dict[str, Callable[..., Any]] = {
    "pack_int4": int4.pack_int4,
    "unpack_int4": int4.unpack_int4,
    "qat_matmul": qat_matmul,
    "qat_matmul_backward_input": qat_matmul_backward_input,
    "qat_matmul_backward_weight": qat_matmul_backward_weight,
    "quantize_integer_groups": quantize.quantize_integer_groups,
    "integer_group_matmul": integer_group_matmul,
    "float_matmul": linear.float_matmul,
    "rms_norm_quantize_train": rms_norm_quantize_train,
    "rms_norm_backward": norm.rms_norm_backward,
    "silu_mul_quantize_train": silu_mul_quantize_train,
    "silu_mul_qat_matmul": silu_mul_qat_matmul,
    "silu_mul_backward": activation.silu_mul_backward,
    "rope_fake_quantize": rope_fake_quantize,
    "distillation_loss_logits": distillation.distillation_loss_logits,
    "distillation_loss_top_k": distillation.distillation_loss_top_k,
}
"""What a kernel backend runs where it has no kernel of its own."""
