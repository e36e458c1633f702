"""Integer and float linears (spec 7, 8, 17)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    FLOAT_DTYPES,
    check_bits,
    check_group_size,
    check_same_device,
    check_shape,
    check_tensor,
    check_weight,
    scale_shape,
)
from ..errors import InvalidArgument
from .rows import check_clip, quantize

ops = torch.ops.llmqat


def _check_bias(bias: Tensor | None, n: int) -> None:
    if bias is not None:
        check_tensor("bias", bias, FLOAT_DTYPES)
        check_shape("bias", bias, (n,))


def quantized_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    w_bits: int,
    a_bits: int,
    group_size: int = -1,
) -> Tensor:
    """Linear layer on quantized weights; x is quantized per token inside (spec 7).

    Args:
        x: float [..., K].
        w: int8 codes [N, K], or 4-bit codes packed by :func:`pack_int4`, uint8 [N, ceil(K / 2)].
        w_scale: fp32 [N], or [N, K / group_size].
        bias: float [N] or None.
        w_bits: 2..8. a_bits: 2..8, or 16 / 32 for float activations.

    Returns:
        [..., N] in x's dtype.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("w_bits", w_bits)
    check_bits("a_bits", a_bits, (16, 32))
    check_weight(w, w_scale, x.shape[-1], w_bits, group_size)
    _check_bias(bias, w.shape[0])
    check_same_device(x=x, w=w, w_scale=w_scale, bias=bias)
    return ops.quantized_linear(x, w, w_scale, bias, w_bits, a_bits, group_size)


def qat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    w_bits: int,
    a_bits: int,
    group_size: int = -1,
    ste_clip: float | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    w_codes: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """Training linear: integer forward, straight-through backward, saves int8 codes and scales
    only (spec 7).

    Args:
        x: float [..., K]. weight: float [N, K], the trained parameter. bias: float [N] or None.
        w_bits, a_bits: 2..8.
        w_codes, w_scale: ``quantize(weight, w_bits, ...)`` computed before, to reuse it; both or
        neither.

    Returns:
        [..., N] in x's dtype.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_tensor("weight", weight, FLOAT_DTYPES, 2)
    check_bits("a_bits", a_bits)
    if (w_codes is None) != (w_scale is None):
        raise InvalidArgument("w_codes, w_scale: pass both or neither")
    if w_codes is None or w_scale is None:
        w_codes, w_scale = quantize(
            weight.detach(), w_bits, group_size=group_size, scale_dtype=scale_dtype
        )
    check_bits("w_bits", w_bits)
    check_weight(w_codes, w_scale, x.shape[-1], w_bits, group_size)
    check_shape("weight", weight, (w_codes.shape[0], x.shape[-1]))
    _check_bias(bias, weight.shape[0])
    check_same_device(x=x, weight=weight, w_codes=w_codes, w_scale=w_scale, bias=bias)
    y, _, _ = ops.qat_linear(
        x, weight, w_codes, w_scale, bias, a_bits, group_size, check_clip(ste_clip)
    )
    return y


def repack_weight(w: Tensor, w_bits: int) -> Tensor:
    """The current backend's kernel layout of a weight: a pure permutation, opaque to callers (spec
    8).

    Args:
        w: int8 codes [N, K], packed uint8 [N, ceil(K / 2)] (``w_bits`` 4), or a float weight
            (``w_bits`` 16 or 32).
    """
    check_tensor("w", w, (torch.int8, torch.uint8, torch.float32, torch.bfloat16), 2)
    check_bits("w_bits", w_bits, (16, 32))
    return ops.repack_weight(w, w_bits)


def repacked_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    n: int,
    w_bits: int,
    group_size: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes a int8 [..., K] with scales fp32 [...] times a weight from :func:`repack_weight` ->
    [..., n] (spec 7).
    """
    check_tensor("a", a, (torch.int8,))
    check_tensor("a_scale", a_scale, (torch.float32,), 0)
    check_shape("a_scale", a_scale, tuple(a.shape[:-1]))
    check_group_size(a.shape[-1], group_size)
    check_shape("w_scale", w_scale, scale_shape((n,), a.shape[-1], group_size))
    _check_bias(bias, n)
    return ops.repacked_matmul(a, a_scale, w, w_scale, bias, n, w_bits, group_size, dtype)


def float_matmul(x: Tensor, w: Tensor, bias: Tensor | None = None, *, n: int) -> Tensor:
    """x [..., K] times a float weight from :func:`repack_weight` -> [..., n]; on CPU a row's
    result does not
    depend on the other rows (spec 17)."""
    check_tensor("x", x, FLOAT_DTYPES)
    _check_bias(bias, n)
    return ops.float_matmul(x, w, bias, n)
