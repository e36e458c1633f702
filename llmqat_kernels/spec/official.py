"""The arithmetic of the paper's released code, for comparison with it: spec 23.

Its results differ from spec 1-5 on purpose: everything is rounded to the tensor's own dtype, the
scale is inverted, and two small constants keep it finite. In bfloat16 a code may be one more than
``qmax``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .asymmetric import levels
from .clipping import STATSQ_CLIP
from .quantize import qmax

SYMMETRIC_EPSILON = 1e-6
ASYMMETRIC_EPSILON = 1e-8


def official_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes [..., C], inverted scale [..., 1]) of symmetric rows, both in x's dtype (spec 23)."""
    top = x.abs().amax(dim=-1, keepdim=True)
    # A number divided by a tensor is the reciprocal, then the product: two roundings.
    inverted = torch.reciprocal(top + SYMMETRIC_EPSILON) * qmax(bits)
    return torch.round(x * inverted), inverted


def fake_quantize_official(
    x: Tensor, bits: int, asymmetric: bool = False, statsq: bool = False
) -> Tensor:
    """Values of rows x [..., C] in x's dtype, each operation rounded to it; bits 2..8 or 16
    (spec 23). `statsq` is what that code does to weights of 2 bits.
    """
    if x.numel() == 0:
        return x.clone()
    if statsq:
        return _statsq(x, bits)
    if not asymmetric:
        codes, inverted = official_codes(x, bits)
        return codes / (inverted + SYMMETRIC_EPSILON)
    low = x.amin(dim=-1, keepdim=True)
    width = x.amax(dim=-1, keepdim=True) - low
    steps = (x - low) / (width + ASYMMETRIC_EPSILON)
    codes = torch.round(steps * levels(bits)) / levels(bits)
    return codes * (width + ASYMMETRIC_EPSILON) + low


def _statsq_position(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x in units of the clipping range, that range [..., 1]), both in x's dtype."""
    scale = 2 * x.abs().mean(dim=-1, keepdim=True)
    return x / scale, scale


def _statsq(x: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    position, scale = _statsq_position(x)
    steps = torch.clamp(position, -STATSQ_CLIP, STATSQ_CLIP) * half - 0.5
    return scale * (torch.round(steps) + 0.5) / half


def official_statsq_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Straight-through gradient, zero where x is clipped; the range is a constant (spec 23)."""
    if x.numel() == 0:
        return grad
    position, _ = _statsq_position(x)
    return torch.where(position.abs() >= STATSQ_CLIP, torch.zeros_like(grad), grad)
