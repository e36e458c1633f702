"""Backward formulas of the training operators (spec 6, 7, 10, 12, 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import register_autograd
from .schemas import SCHEMAS

ops = torch.ops.llmqat

TRAINED = (
    "fake_quantize",
    "qat_linear",
    "rms_norm_quantize_train",
    "silu_mul_quantize_train",
    "distillation_loss",
)
"""Operators with a gradient; the others are inference forms and give none."""


def _fake_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, ctx.ste_clip, _ = inputs
    if ctx.ste_clip is not None:
        ctx.save_for_backward(x)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.ste_clip is not None:
        (x,) = ctx.saved_tensors
        grad = ops.fake_quantize_backward(grad.contiguous(), x, ctx.ste_clip)
    return grad, None, None, None, None


def _qat_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, w_codes, w_scale, bias, _, ctx.group_size, ctx.ste_clip = inputs
    _, a_codes, a_scale = output
    ctx.set_materialize_grads(False)  # no zero-filled gradients for the codes and scales
    ctx.mark_non_differentiable(a_codes, a_scale)
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    clip = ctx.ste_clip
    # Only int8 codes and scales are kept; the clip masks are one bit of information per element.
    masks = () if clip is None else (x.abs() < clip, weight.abs() < clip)
    ctx.save_for_backward(a_codes, a_scale, w_codes, w_scale, *masks)


def _qat_linear_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    a_codes, a_scale, w_codes, w_scale, *masks = ctx.saved_tensors
    dx = dw = db = None
    if grad is None:  # only the codes were used
        return (None,) * 8
    with torch.autocast(grad.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            dx = grad @ ops.dequantize(w_codes, w_scale, ctx.group_size, grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            a = ops.dequantize(a_codes, a_scale, -1, grad.dtype)
            dw = (rows.T @ a.reshape(-1, a.shape[-1])).to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            db = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if masks:
        dx = None if dx is None else torch.where(masks[0], dx, torch.zeros_like(dx))
        dw = None if dw is None else torch.where(masks[1], dw, torch.zeros_like(dw))
    return dx, dw, None, None, db, None, None, None


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.eps, _ = inputs
    _, codes, scale = output
    ctx.mark_non_differentiable(codes, scale)
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    xf, gf = x.float(), grad.float()
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + ctx.eps)
    normed = xf * r
    gw = gf * weight.float()
    dx = r * (gw - normed * (gw * normed).mean(-1, keepdim=True))
    dweight = (gf * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), None, None


def _silu_mul_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, up, _ = inputs
    _, codes, scale = output
    ctx.mark_non_differentiable(codes, scale)
    ctx.save_for_backward(gate, up)


def _silu_mul_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    g, u, d = gate.float(), up.float(), grad.float()
    sigmoid = torch.sigmoid(g)
    dgate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(gate.dtype), (d * g * sigmoid).to(up.dtype), None


def _distillation_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_hidden, grad_head = output
    ctx.mark_non_differentiable(grad_hidden, grad_head)
    ctx.save_for_backward(grad_hidden, grad_head)


def _distillation_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_head = ctx.saved_tensors
    dhidden = grad_hidden * grad.to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None
    dhead = grad_head * grad.to(grad_head.dtype) if ctx.needs_input_grad[1] else None
    return dhidden, dhead, None, None, None, None


def _no_gradient(op: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"llmqat::{op} has no gradient: it is an inference form; call it under torch.no_grad()"
        )

    return backward


register_autograd(
    "llmqat::fake_quantize", _fake_quantize_backward, setup_context=_fake_quantize_setup
)
register_autograd("llmqat::qat_linear", _qat_linear_backward, setup_context=_qat_linear_setup)
register_autograd(
    "llmqat::rms_norm_quantize_train", _rms_norm_backward, setup_context=_rms_norm_setup
)
register_autograd(
    "llmqat::silu_mul_quantize_train", _silu_mul_backward, setup_context=_silu_mul_setup
)
register_autograd(
    "llmqat::distillation_loss", _distillation_backward, setup_context=_distillation_setup
)
for _op, _schema in SCHEMAS.items():
    if _op not in TRAINED and "(a!)" not in _schema:
        register_autograd(f"llmqat::{_op}", _no_gradient(_op))
