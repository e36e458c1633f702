"""Public functions: checked arguments in, one operator call out.

Shapes and formulas: ``docs/spec.md``.
"""

from __future__ import annotations

from .. import autograd as autograd  # registers the backward formulas
from .comparison import (
    fake_quantize_asymmetric,
    fake_quantize_channels,
    fake_quantize_lsq,
    fake_quantize_official,
    fake_quantize_statsq,
    lsq_scale,
)
from .heads import distillation_loss, distillation_loss_logits, distillation_loss_top_k, sample
from .linears import (
    float_matmul,
    integer_group_matmul,
    quantized_linear,
    repack_weight,
    repacked_linear,
    repacked_linear_add,
    repacked_matmul,
    repacked_matmul_add,
    repacked_matmul_silu_mul,
)
from .producers import (
    rms_norm,
    rms_norm_quantize,
    rms_norm_quantize_train,
    silu_mul,
    silu_mul_quantize,
    silu_mul_quantize_train,
)
from .qat import qat_linear, qat_matmul, silu_mul_qat_matmul
from .rows import (
    dequantize,
    fake_quantize,
    pack_int4,
    quantize,
    quantize_integer_groups,
    unpack_int4,
)

__all__ = [
    "dequantize",
    "distillation_loss",
    "distillation_loss_logits",
    "distillation_loss_top_k",
    "fake_quantize",
    "fake_quantize_asymmetric",
    "fake_quantize_channels",
    "fake_quantize_lsq",
    "fake_quantize_official",
    "fake_quantize_statsq",
    "float_matmul",
    "integer_group_matmul",
    "lsq_scale",
    "pack_int4",
    "qat_linear",
    "qat_matmul",
    "quantize",
    "quantize_integer_groups",
    "quantized_linear",
    "repack_weight",
    "repacked_linear",
    "repacked_linear_add",
    "repacked_matmul",
    "repacked_matmul_add",
    "repacked_matmul_silu_mul",
    "rms_norm",
    "rms_norm_quantize",
    "rms_norm_quantize_train",
    "sample",
    "silu_mul",
    "silu_mul_qat_matmul",
    "silu_mul_quantize",
    "silu_mul_quantize_train",
    "unpack_int4",
]
