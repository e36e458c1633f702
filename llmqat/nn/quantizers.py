"""Fake quantization as a `QuantSpec` says: the one place that maps settings to operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llmqat_kernels as qk
from llmqat.config import QuantSpec
from llmqat.errors import ConfigError
from llmqat_kernels.spec.quantize import group_scales

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "integer": torch.uint8}
"""By the names of `QATConfig`; `LinearBits` takes uint8 for integer scales of groups."""
_ROWS: dict[str, Callable[..., Tensor]] = {
    "symmetric": qk.fake_quantize,
    "asymmetric": qk.fake_quantize_asymmetric,
    "statsq": qk.fake_quantize_statsq,
}


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    ste_clip: float | None = None,
    learned_scale: Tensor | None = None,
) -> Tensor:
    """Values of x float [..., C] on the grid of `spec`, in x's dtype; x itself where it is off.

    Args:
        ste_clip: gradients are zero where |x| >= ste_clip (spec 6).
        learned_scale: fp32 [1]; what the quantizer `lsq` learns.
    """
    if not spec.enabled:
        return x
    if spec.numerics == "official":
        return qk.fake_quantize_official(
            x,
            spec.bits,
            asymmetric=spec.quantizer == "asymmetric",
            statsq=spec.quantizer == "statsq",
            ste_clip=ste_clip,
        )
    if spec.quantizer == "lsq":
        assert learned_scale is not None
        return qk.fake_quantize_lsq(x, learned_scale, spec.bits, ste_clip=ste_clip)
    if spec.group_size != -1 and spec.group_axis == "channel_over_tokens":
        return qk.fake_quantize_channels(
            x, spec.bits, group_size=spec.group_size, ste_clip=ste_clip
        )
    if spec.integer_scales:
        return _on_integer_scales(x, spec)
    return _ROWS[spec.quantizer](
        x,
        spec.bits,
        group_size=spec.group_size,
        ste_clip=ste_clip,
        scale_dtype=SCALE_DTYPES[spec.scale_dtype],
    )


def _on_integer_scales(x: Tensor, spec: QuantSpec) -> Tensor:
    """For searches over weights; training multiplies codes (`QATConfig` sees to it)."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError(
            "x: integer scales have no gradient here; call it under torch.no_grad(), or train the"
            " linear, which multiplies codes"
        )
    codes, multiplier, scale = qk.quantize_integer_groups(x, spec.bits, group_size=spec.group_size)
    scales = group_scales(scale, multiplier)
    return qk.dequantize(codes, scales, group_size=spec.group_size, dtype=x.dtype)
