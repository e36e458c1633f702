"""RMSNorm, alone and fused with quantization: spec 12."""

from __future__ import annotations

import torch
from torch import Tensor

from .math import tree_sum
from .quantize import quantize


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
    x: Tensor, weight: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: (y [..., K], codes [..., K], scale [...]), y for the gradient (spec 12)."""
    y = rms_norm(x, weight, eps)
    codes, scale = quantize(y, bits)
    return y, codes, scale
