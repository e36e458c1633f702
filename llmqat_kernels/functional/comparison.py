"""Quantizers that the method is compared with: asymmetric, StatsQ, LSQ, the released numerics
(spec 20-23; LLM-QAT table 4), and channel groups over tokens (spec 24; table 8).

All give values, not codes: a product with them is a float product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import comparison as plain
from ..checks import (
    FLOAT_DTYPES,
    check_bits,
    check_group_size,
    check_same_device,
    check_shape,
    check_tensor,
)
from ..errors import InvalidArgument
from ..spec import clipping
from .rows import bf16_scale, check_clip

ops = torch.ops.llmqat


def fake_quantize_asymmetric(
    x: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    ste_clip: float | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Asymmetric min-max values of every row of x [..., C], in x's dtype (spec 20; Eq. 1).

    Args and errors: as :func:`fake_quantize`. The gradient goes straight through.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits)
    check_group_size(x.shape[-1], group_size)
    clip = check_clip(ste_clip)
    return plain.fake_quantize_asymmetric(x, bits, group_size, clip, bf16_scale(scale_dtype))


def fake_quantize_statsq(
    x: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    ste_clip: float | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of x [..., C] clipped at twice their mean magnitude, in x's dtype (spec 21).

    Args and errors: as :func:`fake_quantize`. No gradient where x is clipped.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits)
    check_group_size(x.shape[-1], group_size)
    clip = check_clip(ste_clip)
    return plain.fake_quantize_statsq(x, bits, group_size, clip, bf16_scale(scale_dtype))


def fake_quantize_lsq(
    x: Tensor, scale: Tensor, bits: int, *, ste_clip: float | None = None
) -> Tensor:
    """Values of x (any shape) on the grid of one learned scale, fp32 [1], in x's dtype (spec 22).

    x and ``scale`` get gradients (LSQ: Esser et al. 2020, Eq. 3).

    Raises:
        InvalidArgument, InvalidArgumentType: bad bits, dtype or shape.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_tensor("scale", scale, (torch.float32,))
    check_shape("scale", scale, (1,))
    check_bits("bits", bits)
    check_same_device(x=x, scale=scale)
    return plain.fake_quantize_lsq(x, scale, bits, check_clip(ste_clip))


def lsq_scale(x: Tensor, bits: int) -> Tensor:
    """The first scale of :func:`fake_quantize_lsq`, fp32 [1], from a batch x (spec 22); NaN if x is
    not finite.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    return clipping.lsq_scale(x.detach(), check_bits("bits", bits))


def fake_quantize_official(
    x: Tensor,
    bits: int,
    *,
    asymmetric: bool = False,
    statsq: bool = False,
    ste_clip: float | None = 2.0,
) -> Tensor:
    """Rows of x [..., C] as the paper's released code rounds them, in x's dtype (spec 23).

    Args:
        bits: 2..8, or 16, which is quantized there.
        asymmetric, statsq: the quantizer; symmetric by default. That code takes StatsQ for weights
            of 2 bits and for nothing else.
        ste_clip: the mask of that code; None for none.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits, (16,))
    if asymmetric and statsq:
        raise InvalidArgument("statsq: has no asymmetric form; leave one of the two out")
    return plain.fake_quantize_official(x, bits, asymmetric, check_clip(ste_clip), statsq)


def fake_quantize_channels(
    x: Tensor, bits: int, *, group_size: int, ste_clip: float | None = None
) -> Tensor:
    """x [..., C] with one scale per ``group_size`` columns over all rows together (spec 24).

    A value depends on all rows of the tensor: meant for training and evaluation, not for decoding.
    The gradient goes straight through (spec 6).

    Raises:
        InvalidArgument, InvalidArgumentType: bad bits, dtype, or a group size that is no divisor.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits)
    if check_group_size(x.shape[-1], group_size) == -1:
        raise InvalidArgument("group_size: -1 has no groups; use a divisor of the columns")
    return ops.fake_quantize_channels(x, bits, group_size, check_clip(ste_clip))
