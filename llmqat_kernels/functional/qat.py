"""Linears in training: integer forward, straight-through backward (spec 7, 18, 19)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    FLOAT_DTYPES,
    check_bits,
    check_same_device,
    check_shape,
    check_tensor,
    check_weight,
)
from ..errors import InvalidArgument
from .linears import check_bias, check_integer_groups
from .rows import check_clip, quantize

ops = torch.ops.llmqat


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
    check_bias(bias, weight.shape[0])
    check_same_device(x=x, weight=weight, w_codes=w_codes, w_scale=w_scale, bias=bias)
    y, _, _ = ops.qat_linear(
        x, weight, w_codes, w_scale, bias, a_bits, group_size, check_clip(ste_clip)
    )
    return y


def qat_matmul(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    w_codes: Tensor,
    w_scale: Tensor,
    w_multiplier: Tensor | None = None,
    group_size: int = -1,
    ste_clip: float | None = None,
) -> Tensor:
    """:func:`qat_linear` on codes that a producer wrote once for several linears (spec 7, 18).

    Args:
        x: float [..., K], what the codes stand for; only its gradient is used, so a producer may
            leave out its values (``values=False``), unless there is a ``ste_clip``.
        a, a_scale: codes int8 [..., K] and scales fp32 [...] of x.
        weight: float [N, K], the trained parameter. bias: float [N] or None.
        w_codes, w_scale: its codes int8 [N, K] and scales fp32 [N] or [N, groups].
        w_multiplier: uint8 [N, groups] of :func:`quantize_integer_groups`; w_scale is then [N].

    Returns:
        [..., N] in x's dtype.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_tensor("a", a, (torch.int8,))
    check_shape("a", a, tuple(x.shape))
    check_tensor("a_scale", a_scale, (torch.float32,), 0)
    check_shape("a_scale", a_scale, tuple(x.shape[:-1]))
    _check_trained(x, weight, bias, w_codes, w_scale, w_multiplier, group_size)
    check_same_device(x=x, a=a, a_scale=a_scale)
    return ops.qat_matmul(
        x,
        a,
        a_scale,
        weight,
        w_codes,
        w_scale,
        w_multiplier,
        bias,
        group_size,
        check_clip(ste_clip),
    )


def silu_mul_qat_matmul(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    a_bits: int,
    w_codes: Tensor,
    w_scale: Tensor,
    w_multiplier: Tensor | None = None,
    group_size: int = -1,
    ste_clip: float | None = None,
) -> Tensor:
    """:func:`qat_matmul` on the codes of ``silu(gate) * up``: keeps gate and up for backward, and
    computes the codes from them anew (spec 14, 19).

    Args:
        gate, up: float [..., K]. a_bits: 2..8. The others: as of :func:`qat_matmul`.

    Returns:
        [..., N] in gate's dtype.
    """
    check_tensor("gate", gate, FLOAT_DTYPES)
    check_tensor("up", up, (gate.dtype,))
    check_shape("up", up, tuple(gate.shape))
    check_bits("a_bits", a_bits)
    _check_trained(gate, weight, bias, w_codes, w_scale, w_multiplier, group_size)
    check_same_device(gate=gate, up=up)
    return ops.silu_mul_qat_matmul(
        gate,
        up,
        a_bits,
        weight,
        w_codes,
        w_scale,
        w_multiplier,
        bias,
        group_size,
        check_clip(ste_clip),
    )


def _check_trained(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    w_multiplier: Tensor | None,
    group_size: int,
) -> None:
    """A trained weight, its codes and its bias fit x [..., K]."""
    check_tensor("weight", weight, FLOAT_DTYPES, 2)
    if w_multiplier is None:
        check_weight(w_codes, w_scale, x.shape[-1], 8, group_size)
    else:
        check_integer_groups(w_codes, w_multiplier, w_scale, x.shape[-1], group_size)
    check_shape("weight", weight, (w_codes.shape[0], x.shape[-1]))
    check_bias(bias, weight.shape[0])
    check_same_device(x=x, weight=weight, w_codes=w_codes, w_scale=w_scale, bias=bias)
