"""Integer and float linears (spec 7, 8, 17)."""

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
    check_weight,
    scale_shape,
)
from ..errors import InvalidArgument

ops = torch.ops.llmqat


def check_bias(bias: Tensor | None, n: int) -> None:
    """``bias`` must be float [n] or None."""
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
    check_bias(bias, w.shape[0])
    check_same_device(x=x, w=w, w_scale=w_scale, bias=bias)
    return ops.quantized_linear(x, w, w_scale, bias, w_bits, a_bits, group_size)


def check_integer_groups(
    w: Tensor, multiplier: Tensor, scale: Tensor, k: int, group_size: int
) -> None:
    """Weight codes of at most 4 bits with multipliers [N, groups] and scales [N] (spec 18)."""
    check_weight(w, scale, k, 4 if w.dtype == torch.uint8 else 8, -1)
    check_tensor("w_multiplier", multiplier, (torch.uint8,), 2)
    check_group_size(k, group_size)
    check_shape("w_multiplier", multiplier, scale_shape((w.shape[0],), k, group_size))
    check_integer_scales(k, 4, group_size)


def _columns(a: Tensor, w_multiplier: Tensor, group_size: int) -> int:
    """K of activations that may be packed: then the groups of the weight tell."""
    if a.dtype != torch.uint8:
        return a.shape[-1]
    check_tensor("w_multiplier", w_multiplier, (torch.uint8,), 2)
    check_group_size(0, group_size)
    k = w_multiplier.shape[-1] * group_size
    check_shape("a", a, (*a.shape[:-1], (k + 1) // 2))
    return k


def integer_group_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_multiplier: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes times weights of at most 4 bits with integer group scales: one int32 sum a result (spec
    18).

    Args:
        a: int8 [..., K], or codes of at most 4 bits packed by :func:`pack_int4`, uint8
            [..., ceil(K / 2)]: then both sides are 4-bit (W4A4). a_scale: fp32 [...].
        w: int8 codes [N, K] or packed uint8, of :func:`quantize_integer_groups`.
        w_multiplier: uint8 [N, K / group_size]. w_scale: fp32 [N].

    That codes of ``w`` are within -7..7, those of ``a`` within -127..127 and multipliers within
    1..63 is up to the caller: with others the int32 sums may wrap (no value is read to check it).

    Returns:
        [..., N] in ``dtype``.

    Raises:
        InvalidArgument: shapes, dtypes or devices that do not fit, or K above 38,342.
    """
    check_tensor("a", a, (torch.int8, torch.uint8))
    check_tensor("a_scale", a_scale, (torch.float32,), 0)
    check_shape("a_scale", a_scale, tuple(a.shape[:-1]))
    check_output_dtype(dtype)
    check_integer_groups(
        w, w_multiplier, w_scale, _columns(a, w_multiplier, group_size), group_size
    )
    check_bias(bias, w.shape[0])
    check_same_device(
        a=a, a_scale=a_scale, w=w, w_multiplier=w_multiplier, w_scale=w_scale, bias=bias
    )
    return ops.integer_group_matmul(a, a_scale, w, w_multiplier, w_scale, bias, group_size, dtype)


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


def _check_repacked(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    """Everything but the weight's layout, which is the backend's."""
    check_tensor("a", a, (torch.int8,))
    check_tensor("a_scale", a_scale, (torch.float32,), 0)
    check_shape("a_scale", a_scale, tuple(a.shape[:-1]))
    check_group_size(a.shape[-1], group_size)
    check_tensor("w_scale", w_scale, (torch.float32,))
    check_shape("w_scale", w_scale, scale_shape((n,), a.shape[-1], group_size))
    check_bias(bias, n)
    check_output_dtype(dtype)
    check_same_device(a=a, a_scale=a_scale, w=w, w_scale=w_scale, bias=bias)


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
    _check_repacked(a, a_scale, w, w_scale, bias, n, group_size, dtype)
    return ops.repacked_matmul(a, a_scale, w, w_scale, bias, n, w_bits, group_size, dtype)


def repacked_matmul_silu_mul(
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
    """:func:`repacked_matmul` with the gate and the up projection stacked in one weight of n rows,
    then ``silu(gate) * up`` -> [..., n / 2], the same bits as in two steps (spec 7, 14).

    Raises:
        InvalidArgument: n is odd.
    """
    _check_repacked(a, a_scale, w, w_scale, bias, n, group_size, dtype)
    if n % 2:
        raise InvalidArgument(f"n: gates and ups are as many, so n is even, got {n}")
    return ops.repacked_matmul_silu_mul(a, a_scale, w, w_scale, bias, n, w_bits, group_size, dtype)


def repacked_matmul_add(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    n: int,
    w_bits: int,
    group_size: int = -1,
) -> Tensor:
    """``residual`` [..., n] plus :func:`repacked_matmul` in its dtype -> [..., n], the same bits as
    in two steps (spec 7).

    Raises:
        InvalidArgument: shapes or dtypes that do not fit.
    """
    check_tensor("residual", residual, FLOAT_DTYPES)
    _check_repacked(a, a_scale, w, w_scale, bias, n, group_size, residual.dtype)
    check_same_device(a=a, residual=residual)
    check_shape("residual", residual, (*a.shape[:-1], n))
    return ops.repacked_matmul_add(a, a_scale, w, w_scale, bias, residual, n, w_bits, group_size)


def _check_repacked_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
) -> None:
    check_tensor("x", x, FLOAT_DTYPES)
    check_bits("w_bits", w_bits)
    check_tensor("w_scale", w_scale, (torch.float32,))
    check_group_size(x.shape[-1], group_size)
    check_shape("w_scale", w_scale, scale_shape((n,), x.shape[-1], group_size))
    check_bias(bias, n)
    check_same_device(x=x, w=w, w_scale=w_scale, bias=bias)


def repacked_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    n: int,
    w_bits: int,
    group_size: int = -1,
) -> Tensor:
    """Float x [..., K] times codes from :func:`repack_weight` -> [..., n] in x's dtype:
    :func:`quantized_linear` with ``a_bits=16`` on a weight that stays in the kernel layout (spec
    7).

    On CPU the bits are those of :func:`float_matmul` on the weight dequantized to x's dtype (spec
    17), and a row's result does not depend on the other rows.

    Args:
        x: float [..., K]. w_scale: fp32 [n], or [n, K / group_size].
        n: rows of the weight. w_bits: 2..8, as ``repack_weight`` was told.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit. RuntimeError: ``w`` is no such weight of
            the backend in use, or its kernel does not take this x, width or group size.
    """
    _check_repacked_linear(x, w, w_scale, bias, n, w_bits, group_size)
    return ops.repacked_linear(x, w, w_scale, bias, n, w_bits, group_size)


def repacked_linear_add(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    n: int,
    w_bits: int,
    group_size: int = -1,
) -> Tensor:
    """``residual`` [..., n] in x's dtype plus :func:`repacked_linear` -> [..., n], the same bits as
    in two steps (spec 7).

    Raises:
        InvalidArgument: shapes or dtypes that do not fit. RuntimeError: as there.
    """
    _check_repacked_linear(x, w, w_scale, bias, n, w_bits, group_size)
    check_tensor("residual", residual, (x.dtype,))
    check_same_device(x=x, residual=residual)
    check_shape("residual", residual, (*x.shape[:-1], n))
    return ops.repacked_linear_add(x, w, w_scale, bias, residual, n, w_bits, group_size)


def float_matmul(x: Tensor, w: Tensor, bias: Tensor | None = None, *, n: int) -> Tensor:
    """x [..., K] times a float weight from :func:`repack_weight` -> [..., n]; on CPU a row's
    result does not depend on the other rows (spec 17).
    """
    check_tensor("x", x, FLOAT_DTYPES)
    check_bias(bias, n)
    return ops.float_matmul(x, w, bias, n)
