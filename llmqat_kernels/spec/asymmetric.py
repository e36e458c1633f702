"""Asymmetric min-max quantization with a float zero point: spec 20 (LLM-QAT Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import ZERO_ROW_AMAX, as_groups


def levels(bits: int) -> int:
    """Largest code of an asymmetric grid of ``bits`` bits (spec 20)."""
    return (1 << bits) - 1


def row_range(x: Tensor, bits: int, bf16_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point, both fp32 [...], of fp32 rows ``x`` [..., C] (spec 20)."""
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1]), x.new_zeros(x.shape[:-1])
    low = x.amin(dim=-1)
    width = x.amax(dim=-1) - low
    scale = torch.div(width, torch.full_like(width, levels(bits)))
    if bf16_scale:
        scale = scale.to(torch.bfloat16).to(torch.float32)
    scale = torch.where(width < ZERO_ROW_AMAX, torch.ones_like(scale), scale)
    finite = torch.isfinite(width)  # the difference of a row holding NaN or Inf is not finite
    nan = torch.full_like(scale, float("nan"))
    return torch.where(finite, scale, nan), torch.where(finite, low, nan)


def quantize_asymmetric(
    x: Tensor, bits: int, group_size: int = -1, bf16_scale: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of x's shape, scale and zero point fp32 [...] or [..., groups] (spec 20)."""
    rows = as_groups(x.to(torch.float32), group_size)
    scale, low = row_range(rows, bits, bf16_scale)
    inv = torch.div(torch.ones_like(scale), scale)
    steps = (rows - low.unsqueeze(-1)) * inv.unsqueeze(-1)
    codes = torch.round(torch.clamp(steps, 0, levels(bits)))
    codes = torch.where(torch.isfinite(scale).unsqueeze(-1), codes, torch.zeros_like(codes))
    return codes.reshape(x.shape).to(torch.uint8), scale, low


def dequantize_asymmetric(
    codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``add_rn(mul_rn(fp32(code), scale), zero_point)``, one cast to ``dtype`` (spec 20)."""
    rows = as_groups(codes.to(torch.float32), group_size)
    values = rows * scale.unsqueeze(-1) + zero_point.unsqueeze(-1)
    return values.reshape(codes.shape).to(dtype)


def fake_quantize_asymmetric(
    x: Tensor, bits: int, group_size: int = -1, bf16_scale: bool = False
) -> Tensor:
    """``dequantize_asymmetric(quantize_asymmetric(x))`` in x's dtype (spec 20)."""
    codes, scale, low = quantize_asymmetric(x, bits, group_size, bf16_scale)
    return dequantize_asymmetric(codes, scale, low, group_size, x.dtype)
