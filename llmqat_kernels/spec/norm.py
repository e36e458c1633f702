"""RMSNorm, alone and fused with quantization: spec 12."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .math import tree_sum
from .quantize import gradient_handle, quantize


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the rows of x [..., K] by weight [K] -> [..., K] in x's dtype (spec 12)."""
    wide = x.to(torch.float32)
    total = tree_sum(wide * wide)
    mean = torch.div(total, torch.full_like(total, float(x.shape[-1])))
    # torch.sqrt of fp32 is off by an ulp at times; through fp64 it is correctly rounded.
    root = torch.sqrt((mean + torch.full_like(mean, eps)).to(torch.float64)).to(torch.float32)
    r = torch.div(torch.ones_like(root), root)
    normed = (wide * r.unsqueeze(-1)).to(x.dtype).to(torch.float32)
    return (normed * weight.to(torch.float32)).to(x.dtype)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize(rms_norm(x + residual))`` -> (codes [..., K], scale [...], sum [..., K]); spec 12.

    The third result is ``x + residual`` in x's dtype, which the next block adds to; without a
    residual it is an empty tensor of shape [0].
    """
    if residual is None:
        total = x.new_empty((0,))
        y = rms_norm(x, weight, eps)
    else:
        total = (x.to(torch.float32) + residual.to(torch.float32)).to(x.dtype)
        y = rms_norm(total, weight, eps)
    codes, scale = quantize(y, bits)
    return codes, scale, total


def rms_norm_quantize_train(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bits: int,
    residual: Tensor | None = None,
    values: bool = True,
    rms_norm_quantize: Callable[..., tuple[Tensor, ...]] = rms_norm_quantize,
    rms_norm: Callable[..., Tensor] = rms_norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training form: (y [..., K], codes [..., K], scale [...], sum [..., K]); spec 12.

    Without ``values``, y is a :func:`gradient_handle`.
    """
    codes, scale, total = rms_norm_quantize(x, weight, eps, bits, residual)
    if not values:
        return gradient_handle(x), codes, scale, total
    return rms_norm(x if residual is None else total, weight, eps), codes, scale, total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx [..., K], dweight [K]) from the gradient of y; ``grad_total`` is added to dx (spec 12).

    x is what was normalized (the sum, where there was a residual).
    """
    wide, wide_grad = x.to(torch.float32), grad.to(torch.float32)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * r
    gw = wide_grad * weight.to(torch.float32)
    dx = r * (gw - normed * (gw * normed).mean(-1, keepdim=True))
    if grad_total is not None:
        dx = dx + grad_total.to(torch.float32)
    dweight = (wide_grad * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)
