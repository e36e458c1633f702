"""Row operators: quantize, dequantize, fake_quantize and int4 packing (spec 1-6, 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    FLOAT_DTYPES,
    check_bits,
    check_group_size,
    check_integer_scales,
    check_output_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    scale_shape,
)
from ..errors import InvalidArgument, InvalidArgumentType

ops = torch.ops.llmqat


def bf16_scale(scale_dtype: torch.dtype) -> bool:
    """Whether scales are rounded to bfloat16; InvalidArgument for a dtype that is no choice."""
    if scale_dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(
            f"scale_dtype: {scale_dtype} is not supported; use torch.float32 or torch.bfloat16"
        )
    return scale_dtype == torch.bfloat16


def quantize(
    x: Tensor, bits: int, *, group_size: int = -1, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Symmetric min-max quantization of every row of ``x`` (spec 1-4; LLM-QAT Eq. 3).

    Args:
        x: float tensor [..., C].
        bits: 2..8.
        group_size: -1 for one scale per row, or a divisor of C.
        scale_dtype: precision the scale is rounded to before use (``float32`` or ``bfloat16``).

    Returns:
        ``codes`` int8 [..., C] in ``[-qmax, qmax]`` and ``scale`` fp32 [...] or [..., C /
        group_size].

    Raises:
        InvalidArgument, InvalidArgumentType: bad bits, group size, dtype or rank.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits)
    check_group_size(x.shape[-1], group_size)
    codes, scale = ops.quantize(x, bits, group_size, bf16_scale(scale_dtype))
    return codes, scale


def dequantize(
    codes: Tensor, scale: Tensor, *, group_size: int = -1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``code * scale`` in ``dtype`` (spec 5). ``codes`` int8 [..., C], ``scale`` fp32 as
    ``quantize`` gave it.
    """
    check_tensor("codes", codes, (torch.int8,))
    check_tensor("scale", scale, (torch.float32,), 0)
    check_output_dtype(dtype)
    check_group_size(codes.shape[-1], group_size)
    check_same_device(codes=codes, scale=scale)
    check_shape("scale", scale, scale_shape(tuple(codes.shape[:-1]), codes.shape[-1], group_size))
    return ops.dequantize(codes, scale, group_size, dtype)


def fake_quantize(
    x: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    ste_clip: float | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``dequantize(quantize(x))`` in x's dtype, with a straight-through gradient (spec 5, 6).

    ``ste_clip`` zeroes the gradient where ``|x| >= ste_clip`` (the paper's released code uses
    2.0); None passes all.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits)
    check_group_size(x.shape[-1], group_size)
    return ops.fake_quantize(x, bits, group_size, check_clip(ste_clip), bf16_scale(scale_dtype))


def check_clip(ste_clip: float | None) -> float | None:
    """``ste_clip`` itself, if it is None or positive."""
    if ste_clip is None:
        return None
    if isinstance(ste_clip, bool) or not isinstance(ste_clip, (int, float)):
        raise InvalidArgumentType(
            f"ste_clip: expected a number or None, got {type(ste_clip).__name__}"
        )
    if not ste_clip > 0:
        raise InvalidArgument(
            f"ste_clip: {ste_clip} must be positive; use None to pass every gradient"
        )
    return ste_clip


def quantize_integer_groups(
    x: Tensor, bits: int, *, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups whose scales are integer multiples of one scale a row, so that a product of whole rows
    is one integer sum (spec 18).

    Args:
        x: float [..., C]. bits: 2..4. group_size: a divisor of C.

    Returns:
        ``codes`` int8 [..., C], ``multiplier`` uint8 [..., C / group_size] of 1..63, ``scale`` fp32
        [...]. The scale of a group is ``multiplier * scale``.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("bits", bits)
    check_group_size(x.shape[-1], group_size)
    check_integer_scales(x.shape[-1], bits, group_size, "bits")
    codes, multiplier, scale = ops.quantize_integer_groups(x, bits, group_size)
    return codes, multiplier, scale


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes [..., C] in [-7, 7] -> uint8 [..., ceil(C / 2)], low nibble = even column (spec
    8).

    Values are not checked: one outside -8..7 wraps to its low 4 bits (8 unpacks as -8), and -8,
    which no quantizer writes, stays -8.
    """
    check_tensor("codes", codes, (torch.int8,))
    return ops.pack_int4(codes)


def unpack_int4(packed: Tensor, columns: int | None = None) -> Tensor:
    """uint8 [..., B] -> int8 codes [..., columns]; ``columns`` defaults to 2B, pass it for an odd
    row (spec 8).
    """
    check_tensor("packed", packed, (torch.uint8,))
    full = 2 * packed.shape[-1]
    columns = full if columns is None else columns
    if columns not in (full, full - 1) or columns < 0:
        raise InvalidArgument(
            f"columns: {columns} does not fit {full // 2} packed bytes; use {full} or {full - 1}"
        )
    return ops.unpack_int4(packed, columns)
