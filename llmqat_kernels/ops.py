"""Registration of every operator: schema, dispatch to a backend, and fake kernel (shapes without
data).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .schemas import SCHEMAS
from .spec.quantize import gradient_handle

LIBRARY = torch.library.Library("llmqat", "DEF")


def _scale_shape(x: Tensor, group_size: int) -> tuple[Any, ...]:
    rows = tuple(x.shape[:-1])
    return rows if group_size == -1 else (*rows, x.shape[-1] // group_size)


def _codes_and_scale(x: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, x.new_empty(_scale_shape(x, group_size), dtype=torch.float32)


def _quantize(
    x: Tensor, bits: int, group_size: int = -1, bf16_scale: bool = False
) -> tuple[Tensor, Tensor]:
    return _codes_and_scale(x, group_size)


def _dequantize(codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _like_first(x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _pack_int4(codes: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] + 1) // 2), dtype=torch.uint8)


def _unpack_int4(packed: Tensor, columns: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], columns), dtype=torch.int8)


def _int_matmul(a: Tensor, w: Tensor, w_bits: int) -> Tensor:
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=torch.int32)


def _quantized_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    w_bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=dtype)


def _quantized_linear(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _qat_linear(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty((*x.shape[:-1], weight.shape[0])), *_codes_and_scale(x))


def _qat_matmul(x: Tensor, a: Tensor, a_scale: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _qat_matmul_backward_input(grad: Tensor, w_codes: Tensor, *args: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], w_codes.shape[1]))


def _qat_matmul_backward_weight(
    grad: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((grad.shape[-1], a.shape[-1]), dtype=dtype)


def _quantize_integer_groups(
    x: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale = _codes_and_scale(x)
    return codes, x.new_empty(_scale_shape(x, group_size), dtype=torch.uint8), scale


def _integer_group_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_multiplier: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], w_multiplier.shape[0]), dtype=dtype)


def _repack_weight(w: Tensor, w_bits: int) -> Tensor:
    choice = dispatch.resolve("repack_weight", w.device.type, dispatch.current_backend())
    kept = choice.backend in ("triton", "cuda") and w.is_floating_point()
    if choice.backend == "reference" or kept:
        return torch.empty(w.shape, dtype=w.dtype, device=w.device)
    size = torch.library.get_ctx().new_dynamic_size()
    return w.new_empty((size,), dtype=torch.uint8)


def _repacked_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], n), dtype=dtype)


def _repacked_matmul_silu_mul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], n // 2), dtype=dtype)


def _repacked_matmul_add(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *args: Any,
) -> Tensor:
    return _like_first(residual)


def _repacked_linear_add(
    x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, residual: Tensor, *args: Any
) -> Tensor:
    return _like_first(residual)


def _repacked_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    n: int,
    w_bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _float_matmul(x: Tensor, w: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty((0,)) if residual is None else _like_first(x)
    return (*_codes_and_scale(x), total)


def _produced(x: Tensor, values: bool) -> Tensor:
    return _like_first(x) if values else gradient_handle(x)


def _rms_norm_quantize_train(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bits: int,
    residual: Tensor | None = None,
    values: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, total = _rms_norm_quantize(x, weight, eps, bits, residual)
    return _produced(x, values), codes, scale, total


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return _like_first(x), _like_first(weight)


def _silu_mul_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _codes_and_scale(gate)


def _silu_mul_quantize_train(
    gate: Tensor, up: Tensor, bits: int, values: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    return (_produced(gate, values), *_codes_and_scale(gate))


def _silu_mul_qat_matmul(
    gate: Tensor, up: Tensor, a_bits: int, weight: Tensor, *args: Any
) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]))


def _silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _like_first(gate), _like_first(up)


def _rope_fake_quantize(k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _like_first(k), _like_first(v)


def _nothing(*args: Any) -> None:
    return None


def _distillation_loss(
    student_hidden: Tensor, student_head: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = student_hidden.new_empty((), dtype=torch.float32)
    return loss, _like_first(student_hidden), _like_first(student_head)


def _distillation_loss_logits(student_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return student_logits.new_empty((), dtype=torch.float32), _like_first(student_logits)


def _attention_decode_quantize(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, head_dim = q.shape
    codes = q.new_empty((n, heads * head_dim), dtype=torch.int8)
    return _like_first(q), codes, q.new_empty((n,), dtype=torch.float32)


def _sample(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "fake_quantize": _like_first,
    "fake_quantize_channels": _like_first,
    "fake_quantize_backward": _like_first,
    "pack_int4": _pack_int4,
    "unpack_int4": _unpack_int4,
    "int_matmul": _int_matmul,
    "quantized_matmul": _quantized_matmul,
    "quantized_linear": _quantized_linear,
    "qat_linear": _qat_linear,
    "qat_matmul": _qat_matmul,
    "qat_matmul_backward_input": _qat_matmul_backward_input,
    "qat_matmul_backward_weight": _qat_matmul_backward_weight,
    "quantize_integer_groups": _quantize_integer_groups,
    "integer_group_matmul": _integer_group_matmul,
    "repack_weight": _repack_weight,
    "repacked_matmul": _repacked_matmul,
    "repacked_matmul_silu_mul": _repacked_matmul_silu_mul,
    "repacked_matmul_add": _repacked_matmul_add,
    "repacked_linear": _repacked_linear,
    "repacked_linear_add": _repacked_linear_add,
    "float_matmul": _float_matmul,
    "rms_norm": _like_first,
    "rms_norm_quantize": _rms_norm_quantize,
    "rms_norm_quantize_train": _rms_norm_quantize_train,
    "rms_norm_backward": _rms_norm_backward,
    "silu_mul": _like_first,
    "silu_mul_quantize": _silu_mul_quantize,
    "silu_mul_quantize_train": _silu_mul_quantize_train,
    "silu_mul_qat_matmul": _silu_mul_qat_matmul,
    "silu_mul_backward": _silu_mul_backward,
    "rope": _like_first,
    "rope_fake_quantize": _rope_fake_quantize,
    "rope_quantize_append": _nothing,
    "attention_decode": _like_first,
    "rope_quantize_append_paged": _nothing,
    "rope_quantize_append_queries": _like_first,
    "attention_decode_paged": _like_first,
    "attention_decode_quantize": _attention_decode_quantize,
    "distillation_loss": _distillation_loss,
    "distillation_loss_logits": _distillation_loss_logits,
    "distillation_loss_top_k": _distillation_loss,
    "sample": _sample,
}


def _kernel(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return dispatch.call(op, args)

    return run


for _op, _schema in SCHEMAS.items():
    LIBRARY.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_op, _kernel(_op), _key)
    torch.library.register_fake(f"llmqat::{_op}", FAKES[_op], lib=LIBRARY)

register_autograd = partial(torch.library.register_autograd, lib=LIBRARY)
