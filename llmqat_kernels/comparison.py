"""Operators of the quantizers that the method is compared with (spec 20-23).

Plain torch on every device and backend: they exist to be measured in accuracy, not in time, so they
have no kernels and no row in ``schemas.py``. As operators they are opaque to ``torch.compile``,
which could otherwise contract a multiply and an add, and give the same bits everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import asymmetric, clipping, official
from .spec.quantize import fake_quantize_backward


@torch.library.custom_op("llmqat::fake_quantize_asymmetric", mutates_args=())
def fake_quantize_asymmetric(
    x: Tensor, bits: int, group_size: int, ste_clip: float | None, bf16_scale: bool
) -> Tensor:
    """See spec 20."""
    return asymmetric.fake_quantize_asymmetric(x, bits, group_size, bf16_scale)


@torch.library.custom_op("llmqat::fake_quantize_statsq", mutates_args=())
def fake_quantize_statsq(
    x: Tensor, bits: int, group_size: int, ste_clip: float | None, bf16_scale: bool
) -> Tensor:
    """See spec 21."""
    return clipping.fake_quantize_statsq(x, bits, group_size, bf16_scale)


@torch.library.custom_op("llmqat::fake_quantize_lsq", mutates_args=())
def fake_quantize_lsq(x: Tensor, scale: Tensor, bits: int, ste_clip: float | None) -> Tensor:
    """See spec 22."""
    return clipping.fake_quantize_lsq(x, scale, bits)


@torch.library.custom_op("llmqat::fake_quantize_official", mutates_args=())
def fake_quantize_official(
    x: Tensor, bits: int, asymmetric: bool, ste_clip: float | None, statsq: bool = False
) -> Tensor:
    """See spec 23."""
    return official.fake_quantize_official(x, bits, asymmetric, statsq)


def _like_first(x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _masked_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # `ste_clip` is the fourth argument of all four operators.
    ctx.ste_clip = inputs[3]
    ctx.arguments = tuple(a for a in inputs if not isinstance(a, Tensor))
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))


def _masked(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
    return grad if ctx.ste_clip is None else fake_quantize_backward(grad, x, ctx.ste_clip)


def _asymmetric_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _masked(ctx, grad, x), None, None, None, None


def _statsq_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    _, group_size, _, bf16_scale = ctx.arguments
    grad = clipping.fake_quantize_statsq_backward(grad, x, group_size, bf16_scale)
    return _masked(ctx, grad, x), None, None, None, None


def _lsq_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    dx, dscale = clipping.fake_quantize_lsq_backward(grad, x, scale, ctx.arguments[0])
    return _masked(ctx, dx, x), dscale.to(scale.dtype), None, None


def _official_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    if ctx.arguments[3]:  # statsq
        grad = official.official_statsq_backward(grad, x)
    return _masked(ctx, grad, x), None, None, None, None


for _op, _backward in (
    (fake_quantize_asymmetric, _asymmetric_backward),
    (fake_quantize_statsq, _statsq_backward),
    (fake_quantize_lsq, _lsq_backward),
    (fake_quantize_official, _official_backward),
):
    _op.register_fake(_like_first)
    _op.register_autograd(_backward, setup_context=_masked_setup)
