"""Public functions: checked arguments in, one operator call out. Shapes and formulas:
``docs/spec.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd as autograd  # registers the backward formulas
from .checks import (
    FLOAT_DTYPES,
    check_bits,
    check_group_size,
    check_same_device,
    check_shape,
    check_tensor,
    check_weight,
    scale_shape,
)
from .errors import InvalidArgument, InvalidArgumentType
from .spec.quantize import qmax

ops = torch.ops.llmqat


def _bf16_scale(scale_dtype: torch.dtype) -> bool:
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
    codes, scale = ops.quantize(x, bits, group_size, _bf16_scale(scale_dtype))
    return codes, scale


def dequantize(
    codes: Tensor, scale: Tensor, *, group_size: int = -1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``code * scale`` in ``dtype`` (spec 5). ``codes`` int8 [..., C], ``scale`` fp32 as
    ``quantize`` gave it.
    """
    check_tensor("codes", codes, (torch.int8,))
    check_tensor("scale", scale, (torch.float32,), 0)
    if dtype not in FLOAT_DTYPES:
        raise InvalidArgument(f"dtype: {dtype} is not supported; use float32, float16 or bfloat16")
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
    return ops.fake_quantize(x, bits, group_size, _check_clip(ste_clip), _bf16_scale(scale_dtype))


def _check_clip(ste_clip: float | None) -> float | None:
    if ste_clip is not None and not ste_clip > 0:
        raise InvalidArgument(
            f"ste_clip: {ste_clip} must be positive; use None to pass every gradient"
        )
    return ste_clip


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes [..., C] in [-7, 7] -> uint8 [..., ceil(C / 2)], low nibble = even column (spec
    8).
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
        x, weight, w_codes, w_scale, bias, a_bits, group_size, _check_clip(ste_clip)
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
    x: Tensor, weight: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: ``(y, codes, scale)`` with y differentiable in x and weight (spec 12)."""
    check_tensor("x", x, FLOAT_DTYPES)
    check_shape("weight", weight, (x.shape[-1],))
    check_bits("bits", bits)
    y, codes, scale = ops.rms_norm_quantize_train(x, weight, eps, bits)
    return y, codes, scale


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


def silu_mul_quantize_train(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: ``(y, codes, scale)`` with y differentiable in gate and up (spec 14)."""
    _check_gate_up(gate, up)
    check_bits("bits", bits)
    y, codes, scale = ops.silu_mul_quantize_train(gate, up, bits)
    return y, codes, scale


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Soft cross entropy of teacher against student logits, [tokens, vocab] never stored (spec 10;
    LLM-QAT Eq. 4).

    Args:
        student_hidden: float [..., H] before the head; teacher_hidden: float [..., H'], same
            tokens.
        student_head, teacher_head: [V, H], [V, H'].
        valid: bool [...] of tokens that count, or None for all.
        chunk_size: tokens whose logits exist at one time.

    Returns:
        fp32 scalar, mean over valid tokens; differentiable in the student's hidden states and head.
    """
    check_tensor("student_hidden", student_hidden, FLOAT_DTYPES, 2)
    check_tensor("teacher_hidden", teacher_hidden, FLOAT_DTYPES, 2)
    check_tensor("student_head", student_head, FLOAT_DTYPES, 2)
    check_tensor("teacher_head", teacher_head, FLOAT_DTYPES, 2)
    tokens = tuple(student_hidden.shape[:-1])
    if tuple(teacher_hidden.shape[:-1]) != tokens:
        raise InvalidArgument(
            f"teacher_hidden: expected tokens {tokens}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    vocab = student_head.shape[0]
    check_shape("student_head", student_head, (vocab, student_hidden.shape[-1]))
    check_shape("teacher_head", teacher_head, (vocab, teacher_hidden.shape[-1]))
    if valid is not None:
        check_tensor("valid", valid, (torch.bool,))
        check_shape("valid", valid, tokens)
        valid = valid.reshape(-1)
    if chunk_size < 1:
        raise InvalidArgument(f"chunk_size: {chunk_size} must be at least 1")
    check_same_device(
        student_hidden=student_hidden, teacher_hidden=teacher_hidden, student_head=student_head
    )
    loss, _, _ = ops.distillation_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head.detach(),
        valid,
        chunk_size,
    )
    return loss


def sample(
    logits: Tensor,
    record: Tensor,
    step: Tensor,
    *,
    seed: int,
    greedy: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """One token per row by Gumbel-max with counter-based noise (spec 15, 16).

    Args:
        logits: float [n, V]. record, step: int64 [n]: with ``seed`` they alone decide the noise,
            so the
            result does not depend on batching or order.
        greedy: bool [n], rows that take the largest logit instead; None samples all.
        temperature: > 0. top_k: 0 samples from the full softmax.

    Returns:
        int64 [n]; -1 for a row with NaN or no finite logit.
    """
    check_tensor("logits", logits, FLOAT_DTYPES, 2)
    n = logits.shape[0]
    check_tensor("record", record, (torch.int64,))
    check_tensor("step", step, (torch.int64,))
    check_shape("record", record, (n,))
    check_shape("step", step, (n,))
    if greedy is None:
        greedy = torch.zeros(n, dtype=torch.bool, device=logits.device)
    check_tensor("greedy", greedy, (torch.bool,))
    check_shape("greedy", greedy, (n,))
    if not temperature > 0:
        raise InvalidArgument(
            f"temperature: {temperature} must be positive; use greedy for the largest logit"
        )
    if top_k < 0:
        raise InvalidArgument(f"top_k: {top_k} must be 0 (off) or positive")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidArgumentType(f"seed: expected an int, got {type(seed).__name__}")
    return ops.sample(logits, record, step, greedy, seed, temperature, top_k)


__all__ = [
    "dequantize",
    "distillation_loss",
    "fake_quantize",
    "float_matmul",
    "pack_int4",
    "qat_linear",
    "qmax",
    "quantize",
    "quantized_linear",
    "repack_weight",
    "repacked_matmul",
    "rms_norm",
    "rms_norm_quantize",
    "rms_norm_quantize_train",
    "sample",
    "silu_mul",
    "silu_mul_quantize",
    "silu_mul_quantize_train",
    "unpack_int4",
]
