"""Normalization and activation fused with the quantization of what they produce (spec 12-14)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_bits, check_shape, check_tensor

ops = torch.ops.llmqat


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with an exactly specified sum (spec 12). x [..., K], weight [K] -> [..., K] in x's
    dtype.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_tensor("weight", weight, FLOAT_DTYPES)
    check_shape("weight", weight, (x.shape[-1],))
    return ops.rms_norm(x, weight, eps)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, bits: int, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize(rms_norm(x + residual))`` in one pass (spec 12).

    Returns:
        ``codes`` int8 [..., K], ``scale`` fp32 [...], and ``x + residual`` in x's dtype (x itself
        without one).
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_tensor("weight", weight, FLOAT_DTYPES)
    check_shape("weight", weight, (x.shape[-1],))
    check_bits("bits", bits)
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,))
        check_shape("residual", residual, tuple(x.shape))
    codes, scale, total = ops.rms_norm_quantize(x, weight, eps, bits, residual)
    return codes, scale, x if residual is None else total


def rms_norm_quantize_train(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bits: int,
    *,
    residual: Tensor | None = None,
    values: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training form of :func:`rms_norm_quantize` (spec 12).

    Args:
        values: False where every consumer reads the codes (:func:`qat_matmul`): y then holds no
            numbers (a NaN that is stored once) and only carries the gradient.

    Returns:
        ``(y, codes, scale, x + residual)``: y and the sum are differentiable in x, residual and
        weight.
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_tensor("weight", weight, FLOAT_DTYPES)
    check_shape("weight", weight, (x.shape[-1],))
    check_bits("bits", bits)
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,))
        check_shape("residual", residual, tuple(x.shape))
    y, codes, scale, total = ops.rms_norm_quantize_train(x, weight, eps, bits, residual, values)
    return y, codes, scale, x if residual is None else total


def _check_gate_up(gate: Tensor, up: Tensor) -> None:
    check_tensor("gate", gate, FLOAT_DTYPES)
    check_tensor("up", up, (gate.dtype,))
    check_shape("up", up, tuple(gate.shape))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` with an exactly specified exp (spec 13, 14). [..., K] each."""
    _check_gate_up(gate, up)
    return ops.silu_mul(gate, up)


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``quantize(silu_mul(gate, up))`` in one pass -> codes int8 [..., K], scale fp32 [...] (spec
    14).
    """
    _check_gate_up(gate, up)
    check_bits("bits", bits)
    codes, scale = ops.silu_mul_quantize(gate, up, bits)
    return codes, scale


def silu_mul_quantize_train(
    gate: Tensor, up: Tensor, bits: int, *, values: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: ``(y, codes, scale)`` with y differentiable in gate and up; ``values`` as in
    :func:`rms_norm_quantize_train` (spec 14).
    """
    _check_gate_up(gate, up)
    check_bits("bits", bits)
    y, codes, scale = ops.silu_mul_quantize_train(gate, up, bits, values)
    return y, codes, scale
