"""Backward formulas of the training operators (spec 6, 7, 10, 12, 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import register_autograd
from .schemas import SCHEMAS
from .spec.quantize import QUANTIZED_BITS, group_scales

ops = torch.ops.llmqat

TRAINED = (
    "fake_quantize",
    "fake_quantize_channels",
    "qat_linear",
    "qat_matmul",
    "rms_norm",
    "rms_norm_quantize_train",
    "silu_mul_quantize_train",
    "silu_mul_qat_matmul",
    "rope",
    "rope_fake_quantize",
    "distillation_loss",
    "distillation_loss_logits",
    "distillation_loss_top_k",
)
"""Operators with a gradient; the others are inference forms and give none."""


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # x, bits, group_size, ste_clip; fake_quantize also has bf16_scale.
    x, ctx.ste_clip, ctx.others = inputs[0], inputs[3], len(inputs) - 1
    if ctx.ste_clip is not None:
        ctx.save_for_backward(x)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.ste_clip is not None:
        (x,) = ctx.saved_tensors
        grad = ops.fake_quantize_backward(grad.contiguous(), x, ctx.ste_clip)
    return grad, *(None,) * ctx.others


def _keep_codes(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: tuple[Tensor, ...]
) -> None:
    """Save int8 codes and scales, and with ``ctx.ste_clip`` the masks: one bit an element."""
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    clip = ctx.ste_clip
    masks = () if clip is None else (x.abs() < clip, weight.abs() < clip)
    ctx.save_for_backward(*codes, *masks)


def _linear_gradients(
    ctx: Any,
    grad: Tensor,
    saved: tuple[Tensor, ...],
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dW, db of an integer linear (spec 7); ``saved``: codes and scales of input and weight,
    and the masks of the two where there is a ``ste_clip``.
    """
    a_codes, a_scale, w_codes, w_scale, *masks = saved
    dx = dw = db = None
    with torch.autocast(grad.device.type, enabled=False):
        if needs_x:
            dx = ops.qat_matmul_backward_input(grad, w_codes, w_scale, ctx.group_size)
        if needs_weight:
            dw = ops.qat_matmul_backward_weight(grad, a_codes, a_scale, ctx.weight_dtype)
        if ctx.bias_dtype is not None and needs_bias:
            rows = grad.reshape(-1, grad.shape[-1])
            db = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if masks:
        dx = None if dx is None else torch.where(masks[0], dx, torch.zeros_like(dx))
        dw = None if dw is None else torch.where(masks[1], dw, torch.zeros_like(dw))
    return dx, dw, db


def _qat_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, w_codes, w_scale, bias, _, ctx.group_size, ctx.ste_clip = inputs
    _, a_codes, a_scale = output
    ctx.set_materialize_grads(False)  # no zero-filled gradients for the codes and scales
    ctx.mark_non_differentiable(a_codes, a_scale)
    _keep_codes(ctx, x, weight, bias, (a_codes, a_scale, w_codes, w_scale))


def _qat_linear_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:  # only the codes were used
        return (None,) * 8
    needs = ctx.needs_input_grad
    dx, dw, db = _linear_gradients(ctx, grad, ctx.saved_tensors, needs[0], needs[1], needs[4])
    return dx, dw, None, None, db, None, None, None


def _qat_matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a, a_scale, weight, w_codes, w_scale, w_multiplier, bias, ctx.group_size, ctx.ste_clip = (
        inputs
    )
    _keep_codes(ctx, x, weight, bias, (a, a_scale, w_codes, group_scales(w_scale, w_multiplier)))


def _qat_matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    dx, dw, db = _linear_gradients(ctx, grad, ctx.saved_tensors, needs[0], needs[3], needs[7])
    return dx, None, None, dw, None, None, None, db, None, None


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return *ops.rms_norm_backward(grad, x, weight, ctx.eps), None


def _norm_producer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.eps, _, residual, _ = inputs
    _, codes, scale, total = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(codes, scale)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight)


def _norm_producer_backward(
    ctx: Any, grad: Tensor | None, _codes: Any, _scale: Any, grad_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if not ctx.has_residual:
        grad_total = None
    if grad is None:  # only the sum was used
        return grad_total, None, None, None, grad_total, None
    dx, dweight = ops.rms_norm_backward(grad, x, weight, ctx.eps, grad_total)
    return dx, dweight, None, None, dx if ctx.has_residual else None, None


def _silu_mul_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, up, _, _ = inputs
    _, codes, scale = output
    ctx.mark_non_differentiable(codes, scale)
    ctx.save_for_backward(gate, up)


def _silu_mul_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *ops.silu_mul_backward(grad, gate, up), None, None


def _silu_mul_qat_matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.a_bits, weight, w_codes, w_scale, w_multiplier, bias, *options = inputs
    ctx.group_size, ctx.ste_clip = options
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    masks = () if ctx.ste_clip is None else (weight.abs() < ctx.ste_clip,)
    ctx.save_for_backward(gate, up, w_codes, group_scales(w_scale, w_multiplier), *masks)


def _silu_mul_qat_matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, w_codes, w_scale, *masks = ctx.saved_tensors
    needs = ctx.needs_input_grad
    # Exact operators give the same codes again: cheaper than keeping them beside gate and up.
    codes = ops.silu_mul_quantize(gate, up, ctx.a_bits) if needs[3] else (gate, gate)
    if masks:
        masks.insert(0, ops.silu_mul(gate, up).abs() < ctx.ste_clip)
    saved = (*codes, w_codes, w_scale, *masks)
    dx, dw, db = _linear_gradients(ctx, grad, saved, needs[0] or needs[1], needs[3], needs[7])
    dgate, dup = (None, None) if dx is None else ops.silu_mul_backward(dx, gate, up)
    return dgate, dup, None, dw, None, None, None, db, None, None


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rope_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    return ops.rope(grad, cos, -sin, positions), None, None, None


def _rope_fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    k, v, cos, sin, positions, bits, ctx.pre_rope, clip = inputs
    ctx.ste_clip = clip if bits in QUANTIZED_BITS else None
    ctx.save_for_backward(cos, sin, positions, *(() if ctx.ste_clip is None else (k, v)))


def _rope_fake_quantize_backward(
    ctx: Any, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor | None, ...]:
    cos, sin, positions, *inputs = ctx.saved_tensors
    if not inputs:
        grad_k = ops.rope(grad_k, cos, -sin, positions)
    else:
        k, v = inputs
        clip = ctx.ste_clip
        if ctx.pre_rope:
            grad_k = ops.rope(grad_k, cos, -sin, positions)
            grad_k = ops.fake_quantize_backward(grad_k, k, clip)
        else:
            rotated = ops.rope(k, cos, sin, positions)
            grad_k = ops.fake_quantize_backward(grad_k.contiguous(), rotated, clip)
            grad_k = ops.rope(grad_k, cos, -sin, positions)
        grad_v = ops.fake_quantize_backward(grad_v.contiguous(), v, clip)
    return grad_k, grad_v, None, None, None, None, None, None


def _scaled(grad: Tensor, upstream: Tensor, needed: bool) -> Tensor | None:
    return grad * upstream.to(grad.dtype) if needed else None


def _scaled_for_good(grad: Tensor, upstream: Tensor, needed: bool) -> Tensor | None:
    """In place where the graph is used up: a head's gradient is too large to exist twice.

    Not while a compiler traces (the tensor is of a class of its own then): it plans memory itself.
    """
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if needed and not kept and type(grad) is Tensor:
        return grad.mul_(upstream.to(grad.dtype))
    return _scaled(grad, upstream, needed)


def _distillation_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_hidden, grad_head = output
    ctx.mark_non_differentiable(grad_hidden, grad_head)
    ctx.save_for_backward(grad_hidden, grad_head)


def _distillation_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_head = ctx.saved_tensors
    dhidden = _scaled_for_good(grad_hidden, grad, ctx.needs_input_grad[0])
    dhead = _scaled_for_good(grad_head, grad, ctx.needs_input_grad[1])
    return dhidden, dhead, None, None, None, None


def _distillation_logits_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _distillation_logits_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (grad_logits,) = ctx.saved_tensors
    return _scaled_for_good(grad_logits, grad, ctx.needs_input_grad[0]), None, None, None


def _no_gradient(op: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"llmqat::{op} has no gradient: it is an inference form; call it under torch.no_grad()"
        )

    return backward


for _op in ("fake_quantize", "fake_quantize_channels"):
    register_autograd(f"llmqat::{_op}", _fake_quantize_backward, setup_context=_fake_quantize_setup)
register_autograd("llmqat::qat_linear", _qat_linear_backward, setup_context=_qat_linear_setup)
register_autograd("llmqat::rms_norm", _rms_norm_backward, setup_context=_rms_norm_setup)
register_autograd(
    "llmqat::rms_norm_quantize_train", _norm_producer_backward, setup_context=_norm_producer_setup
)
register_autograd(
    "llmqat::silu_mul_quantize_train", _silu_mul_backward, setup_context=_silu_mul_setup
)
register_autograd("llmqat::qat_matmul", _qat_matmul_backward, setup_context=_qat_matmul_setup)
register_autograd(
    "llmqat::silu_mul_qat_matmul",
    _silu_mul_qat_matmul_backward,
    setup_context=_silu_mul_qat_matmul_setup,
)
register_autograd("llmqat::rope", _rope_backward, setup_context=_rope_setup)
register_autograd(
    "llmqat::rope_fake_quantize",
    _rope_fake_quantize_backward,
    setup_context=_rope_fake_quantize_setup,
)
for _op in ("distillation_loss", "distillation_loss_top_k"):
    register_autograd(f"llmqat::{_op}", _distillation_backward, setup_context=_distillation_setup)
register_autograd(
    "llmqat::distillation_loss_logits",
    _distillation_logits_backward,
    setup_context=_distillation_logits_setup,
)
for _op, _schema in SCHEMAS.items():
    if _op not in TRAINED and "(a!)" not in _schema:
        register_autograd(f"llmqat::{_op}", _no_gradient(_op))
