"""Quantizers that clip: StatsQ for weights (spec 21) and LSQ for activations (spec 22).

The method itself never clips; these are the comparison of LLM-QAT table 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .math import tree_sum
from .quantize import ZERO_ROW_AMAX, as_groups, qmax

STATSQ_CLIP = 0.99
"""Largest |w / s|: below 1, so that no code leaves its range (spec 21)."""
LSQ_MIN_SCALE = 2.0**-24
"""A learned scale below this counts as this: the grid keeps its orientation (spec 22)."""


def statsq_scale(x: Tensor, bf16_scale: bool = False) -> Tensor:
    """Clipping range fp32 [...] of fp32 rows ``x`` [..., C]: twice the mean magnitude (spec 21)."""
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    total = tree_sum(x.abs())
    scale = 2.0 * torch.div(total, torch.full_like(total, float(x.shape[-1])))
    if bf16_scale:
        scale = scale.to(torch.bfloat16).to(torch.float32)
    return torch.where(torch.isfinite(scale), scale, torch.full_like(scale, float("nan")))


def _statsq_position(rows: Tensor, scale: Tensor) -> Tensor:
    inv = torch.div(torch.ones_like(scale), scale)
    return rows * inv.unsqueeze(-1)


def fake_quantize_statsq(
    x: Tensor, bits: int, group_size: int = -1, bf16_scale: bool = False
) -> Tensor:
    """Values of x [..., C] on the clipped mid-rise grid, in x's dtype (spec 21)."""
    rows = as_groups(x.to(torch.float32), group_size)
    scale = statsq_scale(rows, bf16_scale)
    half = float(1 << (bits - 1))
    position = torch.clamp(_statsq_position(rows, scale), -STATSQ_CLIP, STATSQ_CLIP)
    code = torch.round(position * half - 0.5)
    values = scale.unsqueeze(-1) * ((code + 0.5) / half)  # an exact quotient: half is a power of 2
    zero = (scale < ZERO_ROW_AMAX).unsqueeze(-1)
    return torch.where(zero, torch.zeros_like(values), values).reshape(x.shape).to(x.dtype)


def fake_quantize_statsq_backward(
    grad: Tensor, x: Tensor, group_size: int, bf16_scale: bool
) -> Tensor:
    """Straight-through gradient, zero where x is clipped; the range is a constant (spec 21)."""
    rows = as_groups(x.to(torch.float32), group_size)
    scale = statsq_scale(rows, bf16_scale)
    clipped = _statsq_position(rows, scale).abs() >= STATSQ_CLIP
    return torch.where(clipped.reshape(x.shape), torch.zeros_like(grad), grad)


def lsq_scale(x: Tensor, bits: int) -> Tensor:
    """First scale, fp32 [1], from a batch ``x`` of any shape: ``2 mean|x| / sqrt(Qp)`` (spec 22).

    1 for a batch of zeros, NaN for one that is not finite.
    """
    if x.numel() == 0:
        return torch.ones(1, device=x.device)
    mean = x.to(torch.float32).abs().mean()
    scale = 2.0 * mean / math.sqrt(qmax(bits))
    scale = torch.where(mean < ZERO_ROW_AMAX, torch.ones_like(scale), scale)
    nan = torch.full_like(scale, float("nan"))
    return torch.where(torch.isfinite(scale), scale, nan).reshape(1)


def _lsq_position(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x in steps of the scale, and the (floored) scale; both fp32."""
    step = torch.clamp(scale.to(torch.float32), min=LSQ_MIN_SCALE)
    return x.to(torch.float32) * torch.div(torch.ones_like(step), step), step


def fake_quantize_lsq(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Values of x (any shape) on the grid of one learned scale [1], in x's dtype (spec 22)."""
    position, step = _lsq_position(x, scale)
    values = torch.round(torch.clamp(position, -qmax(bits) - 1, qmax(bits))) * step
    nan = torch.full_like(values, float("nan"))
    return torch.where(torch.isfinite(x), values, nan).to(x.dtype)


def fake_quantize_lsq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """(dx of x's shape and dtype, dscale fp32 [1]) (spec 22; LSQ Eq. 3, gradient scale
    ``1 / sqrt(numel Qp)``).
    """
    low, high = -qmax(bits) - 1, qmax(bits)
    position, _ = _lsq_position(x, scale)
    inside = (position > low) & (position < high)
    slope = torch.where(inside, torch.round(position) - position, torch.clamp(position, low, high))
    total = (grad.to(torch.float32) * slope).sum()
    dscale = total / math.sqrt(max(x.numel(), 1) * high)
    return torch.where(inside, grad, torch.zeros_like(grad)), dscale.reshape(1)
