"""Row quantization: spec 1-6."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTIZED_BITS = range(2, 9)
ZERO_ROW_AMAX = 2.0**-100
"""Below this amax a row counts as zero, so that no backend ever divides by a subnormal (spec 2)."""


def qmax(bits: int) -> int:
    """Largest code of a symmetric grid of ``bits`` bits (spec 1)."""
    return (1 << (bits - 1)) - 1


def row_scale(x: Tensor, bits: int, bf16_scale: bool = False) -> Tensor:
    """Scale of each row of fp32 ``x`` [..., C] -> fp32 [...] (spec 2, 3)."""
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    amax = x.abs().amax(dim=-1)
    scale = torch.div(amax, torch.full_like(amax, qmax(bits)))
    if bf16_scale:
        scale = scale.to(torch.bfloat16).to(torch.float32)
    scale = torch.where(amax < ZERO_ROW_AMAX, torch.ones_like(scale), scale)
    finite = torch.isfinite(x).all(dim=-1)
    return torch.where(finite, scale, torch.full_like(scale, float("nan")))


def row_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of fp32 rows ``x`` [..., C] on the grid ``scale`` [...] -> int8 [..., C] (spec 4)."""
    limit = qmax(bits)
    # torch.div of two tensors: `1.0 / t` is not always the correctly rounded quotient.
    inv = torch.div(torch.ones_like(scale), scale)
    codes = torch.round(torch.clamp(x * inv.unsqueeze(-1), -limit, limit))
    keep = (
        torch.isfinite(scale) & (x.abs().amax(dim=-1) >= ZERO_ROW_AMAX)
        if x.shape[-1]
        else scale > 0
    )
    return torch.where(keep.unsqueeze(-1), codes, torch.zeros_like(codes)).to(torch.int8)


def gradient_handle(like: Tensor) -> Tensor:
    """A tensor of ``like``'s shape and dtype that only carries a gradient: one stored NaN (spec 6).

    Its consumers read codes and scales instead; whoever reads it by mistake computes NaN.
    """
    return like.new_full((1,) * like.dim(), float("nan")).expand(like.shape)


def as_groups(x: Tensor, group_size: int) -> Tensor:
    """View rows as groups: [..., C] -> [..., C / group_size, group_size]; unchanged for -1."""
    return x if group_size == -1 else x.unflatten(-1, (x.shape[-1] // group_size, group_size))


def quantize(
    x: Tensor, bits: int, group_size: int = -1, bf16_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes int8 of x's shape and fp32 scales [...] or [..., groups] (spec 1-4)."""
    rows = as_groups(x.to(torch.float32), group_size)
    scale = row_scale(rows, bits, bf16_scale)
    return row_codes(rows, scale, bits).reshape(x.shape), scale


def dequantize(codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """``mul_rn(fp32(code), scale)``, one cast to ``dtype`` (spec 5)."""
    rows = as_groups(codes.to(torch.float32), group_size)
    return (rows * scale.unsqueeze(-1)).reshape(codes.shape).to(dtype)


def fake_quantize(
    x: Tensor,
    bits: int,
    group_size: int = -1,
    ste_clip: float | None = None,
    bf16_scale: bool = False,
) -> Tensor:
    """``dequantize(quantize(x))`` in x's dtype (spec 5); ``ste_clip`` only matters to the
    gradient.
    """
    codes, scale = quantize(x, bits, group_size, bf16_scale)
    return dequantize(codes, scale, group_size, x.dtype)


def fake_quantize_backward(grad: Tensor, x: Tensor, ste_clip: float | None) -> Tensor:
    """Straight-through gradient, zero where ``|x| >= ste_clip`` (spec 6)."""
    if ste_clip is None:
        return grad.clone()
    return torch.where(x.to(torch.float32).abs() < ste_clip, grad, torch.zeros_like(grad))


MAX_MULTIPLIER = 63
"""Largest integer group multiplier: 6 bits keep scale * multiplier exact in fp32, and the int32
accumulator of a 4-bit weight safe to K = 38,342 (spec 18)."""


def quantize_integer_groups(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of x's shape, multipliers uint8 [..., groups], scale fp32 [...] (spec 18).

    The scale of a group is ``multiplier * scale``: an integer times a bf16 number.
    """
    rows = as_groups(x.to(torch.float32), group_size)
    fine = row_scale(rows, bits)
    if fine.shape[-1] == 0:  # no column
        return x.to(torch.int8), fine.to(torch.uint8), x.new_ones(x.shape[:-1], dtype=torch.float32)
    zero = rows.abs().amax(dim=-1) < ZERO_ROW_AMAX
    top = torch.where(zero, torch.zeros_like(fine), fine).amax(dim=-1)
    scale = torch.div(top, torch.full_like(top, MAX_MULTIPLIER))
    scale = scale.to(torch.bfloat16).to(torch.float32)
    scale = torch.where(zero.all(dim=-1), torch.ones_like(scale), scale)
    # Rounded up: what it cuts of a group's largest value is only what rounding s, and the limit of
    # 63, leave out.
    steps = torch.div(fine, scale.unsqueeze(-1).expand_as(fine))
    multiplier = torch.ceil(torch.clamp(steps, 1, MAX_MULTIPLIER))
    multiplier = torch.where(
        zero | ~torch.isfinite(multiplier), torch.ones_like(multiplier), multiplier
    )
    codes = row_codes(rows, multiplier * scale.unsqueeze(-1), bits)
    return codes.reshape(x.shape), multiplier.to(torch.uint8), scale


def group_scales(scale: Tensor, multiplier: Tensor | None) -> Tensor:
    """Scales fp32 [..., groups] of integer groups: exact products (spec 18); without multipliers
    ``scale`` itself.
    """
    return scale if multiplier is None else multiplier.to(torch.float32) * scale.unsqueeze(-1)


def are_integer_scales(scales: Tensor) -> bool:
    """Whether :func:`split_group_scales` takes ``scales`` [..., groups] apart without loss: then
    they are those of integer groups (NaN in a row that is not finite).
    """
    multiplier, scale = split_group_scales(scales)
    exact = scale.to(torch.bfloat16).to(torch.float32)
    same = (group_scales(exact, multiplier) == scales) | scale.isnan().unsqueeze(-1)
    return bool(same.all())


def split_group_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers uint8 [..., groups] and scale fp32 [...]: what :func:`group_scales` was given, if
    :func:`quantize_integer_groups` made it (spec 18).

    The largest multiplier of a row is then 63, but for a row of zeros, whose scales are all 1 (63
    times a bf16 number never is). From other scales comes what does not give them back.
    """
    top = scales.amax(dim=-1)
    scale = torch.div(top, torch.full_like(top, MAX_MULTIPLIER))
    scale = torch.where((scales == 1).all(dim=-1), torch.ones_like(scale), scale)
    return torch.round(scales / scale.unsqueeze(-1)).to(torch.uint8), scale
