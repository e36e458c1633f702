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


def _repack_weight(w: Tensor, w_bits: int) -> Tensor:
    choice = dispatch.resolve("repack_weight", w.device.type, dispatch.current_backend())
    if choice.backend == "reference":
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


def _float_matmul(x: Tensor, w: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty((0,)) if residual is None else _like_first(x)
    return (*_codes_and_scale(x), total)


def _rms_norm_quantize_train(
    x: Tensor, weight: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (_like_first(x), *_codes_and_scale(x))


def _silu_mul_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _codes_and_scale(gate)


def _silu_mul_quantize_train(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    return (_like_first(gate), *_codes_and_scale(gate))


def _nothing(*args: Any) -> None:
    return None


def _distillation_loss(
    student_hidden: Tensor, student_head: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = student_hidden.new_empty((), dtype=torch.float32)
    return loss, _like_first(student_hidden), _like_first(student_head)


def _sample(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "fake_quantize": _like_first,
    "fake_quantize_backward": _like_first,
    "pack_int4": _pack_int4,
    "unpack_int4": _unpack_int4,
    "int_matmul": _int_matmul,
    "quantized_matmul": _quantized_matmul,
    "quantized_linear": _quantized_linear,
    "qat_linear": _qat_linear,
    "repack_weight": _repack_weight,
    "repacked_matmul": _repacked_matmul,
    "float_matmul": _float_matmul,
    "rms_norm": _like_first,
    "rms_norm_quantize": _rms_norm_quantize,
    "rms_norm_quantize_train": _rms_norm_quantize_train,
    "silu_mul": _like_first,
    "silu_mul_quantize": _silu_mul_quantize,
    "silu_mul_quantize_train": _silu_mul_quantize_train,
    "rope": _like_first,
    "rope_quantize_append": _nothing,
    "attention_decode": _like_first,
    "distillation_loss": _distillation_loss,
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
