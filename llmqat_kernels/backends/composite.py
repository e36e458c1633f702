"""Operators that every kernel backend composes of others, or leaves to plain torch.

Nothing here is a second home of a formula: each entry is a function of ``spec/``, with operators of
the current backend in place of the reference's where they do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..spec import activation, distillation, int4, linear, norm, paged, quantize, rope


def _operator(op: str) -> Callable[..., Any]:
    """The operator on whatever backend is in force, looked up when called."""

    def run(*args: Any) -> Any:
        return getattr(torch.ops.llmqat, op)(*args)

    return run


def _composed(function: Callable[..., Any], *operators: str) -> Callable[..., Any]:
    """A function of the specification with operators for its parts of the same names."""
    return partial(function, **{op: _operator(op) for op in operators})


def float_matmul(x: Tensor, w: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """See spec 17. CUDA multiplies 16-bit operands as they are, with fp32 sums: widening the weight
    would read and write it several times over in every decode step.
    """
    if not (x.is_cuda and x.dtype == w.dtype and x.dtype in (torch.bfloat16, torch.float16)):
        return linear.float_matmul(x, w, bias, n)
    y = torch.mm(x.flatten(0, -2), w.T, out_dtype=torch.float32).view(*x.shape[:-1], n)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


COMPOSITES: dict[str, Callable[..., Any]] = {
    "pack_int4": int4.pack_int4,
    "unpack_int4": int4.unpack_int4,
    "qat_matmul": _composed(linear.qat_matmul, "quantized_matmul", "integer_group_matmul"),
    "qat_matmul_backward_input": _composed(linear.qat_matmul_backward_input, "dequantize"),
    "qat_matmul_backward_weight": _composed(linear.qat_matmul_backward_weight, "dequantize"),
    "quantize_integer_groups": quantize.quantize_integer_groups,
    "integer_group_matmul": _composed(linear.integer_group_matmul, "int_matmul"),
    "repacked_matmul_silu_mul": _composed(
        linear.repacked_matmul_silu_mul, "repacked_matmul", "silu_mul"
    ),
    "repacked_matmul_add": _composed(linear.repacked_matmul_add, "repacked_matmul"),
    "repacked_linear_add": _composed(linear.repacked_linear_add, "repacked_linear"),
    "float_matmul": float_matmul,
    "rms_norm_quantize_train": _composed(
        norm.rms_norm_quantize_train, "rms_norm_quantize", "rms_norm"
    ),
    "rms_norm_backward": norm.rms_norm_backward,
    "silu_mul_quantize_train": _composed(
        activation.silu_mul_quantize_train, "silu_mul_quantize", "silu_mul"
    ),
    "silu_mul_qat_matmul": _composed(linear.silu_mul_qat_matmul, "silu_mul_quantize", "qat_matmul"),
    "silu_mul_backward": activation.silu_mul_backward,
    "rope_fake_quantize": _composed(rope.rope_fake_quantize, "rope", "fake_quantize"),
    "rope_quantize_append_paged": _composed(
        paged.rope_quantize_append_paged, "rope_quantize_append"
    ),
    "rope_quantize_append_queries": _composed(
        paged.rope_quantize_append_queries,
        "rope_quantize_append",
        "rope_quantize_append_paged",
        "rope",
    ),
    "attention_decode_paged": _composed(paged.attention_decode_paged, "attention_decode"),
    "attention_decode_quantize": _composed(
        paged.attention_decode_quantize,
        "attention_decode",
        "attention_decode_paged",
        "quantize",
    ),
    "distillation_loss_logits": distillation.distillation_loss_logits,
    "distillation_loss_top_k": distillation.distillation_loss_top_k,
}
"""What a kernel backend runs where it has no kernel of its own."""
