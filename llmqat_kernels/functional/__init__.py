"""Public functions: checked arguments in, one operator call out.

Shapes and formulas: ``docs/spec.md``.
"""

from __future__ import annotations

from .. import autograd as autograd  # registers the backward formulas
from .heads import distillation_loss, sample
from .linears import float_matmul, qat_linear, quantized_linear, repack_weight, repacked_matmul
from .producers import (
    rms_norm,
    rms_norm_quantize,
    rms_norm_quantize_train,
    silu_mul,
    silu_mul_quantize,
    silu_mul_quantize_train,
)
from .rows import dequantize, fake_quantize, pack_int4, quantize, unpack_int4

__all__ = [
    "dequantize",
    "distillation_loss",
    "fake_quantize",
    "float_matmul",
    "pack_int4",
    "qat_linear",
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
