"""Quantization kernels of LLM-QAT: one numeric definition, several backends, usable alone.

>>> import torch, llmqat_kernels as qk
>>> codes, scale = qk.quantize(torch.randn(4, 64), 8)
"""

from __future__ import annotations

import os as _os
import sys as _sys

# Spinning OpenMP workers cost 30x on busy cores. The policy is read when the runtime loads, so it
# can
# only be set here if torch (which loads it) is not imported yet; the user's own choice stands.
if "torch" not in _sys.modules:
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .dispatch import Choice, choices, current_backend, use_backend, use_composed
from .errors import BackendUnavailable, InvalidArgument, InvalidArgumentType
from .functional import (
    dequantize,
    distillation_loss,
    distillation_loss_logits,
    distillation_loss_top_k,
    fake_quantize,
    fake_quantize_asymmetric,
    fake_quantize_channels,
    fake_quantize_lsq,
    fake_quantize_official,
    fake_quantize_statsq,
    float_matmul,
    integer_group_matmul,
    lsq_scale,
    pack_int4,
    qat_linear,
    qat_matmul,
    quantize,
    quantize_integer_groups,
    quantized_linear,
    repack_weight,
    repacked_linear,
    repacked_linear_add,
    repacked_matmul,
    repacked_matmul_add,
    repacked_matmul_silu_mul,
    rms_norm,
    rms_norm_quantize,
    rms_norm_quantize_train,
    sample,
    silu_mul,
    silu_mul_qat_matmul,
    silu_mul_quantize,
    silu_mul_quantize_train,
    unpack_int4,
)
from .kv import KVCache, attention_decode, rope, rope_fake_quantize, rope_quantize_append
from .spec import SPEC_VERSION

__version__ = "0.1.0"

__all__ = [
    "SPEC_VERSION",
    "BackendUnavailable",
    "Choice",
    "InvalidArgument",
    "InvalidArgumentType",
    "KVCache",
    "attention_decode",
    "choices",
    "current_backend",
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
    "rope",
    "rope_fake_quantize",
    "rope_quantize_append",
    "sample",
    "silu_mul",
    "silu_mul_qat_matmul",
    "silu_mul_quantize",
    "silu_mul_quantize_train",
    "unpack_int4",
    "use_backend",
    "use_composed",
]
