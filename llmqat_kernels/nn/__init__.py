"""Modules for a training loop of one's own: quantize once where a tensor is produced, share its
codes among all consumers, keep nothing but codes for backward.

A producer (:class:`QuantizedRMSNorm`, :class:`QuantizedSwiGLU`'s activation) hands
:class:`QuantizedRows` to its consumers (:class:`QATLinear`); :class:`QuantizedKV` stands between
the projections and any attention. Nothing here knows a model family.

>>> import torch
>>> from llmqat_kernels import nn as qnn
>>> bits = qnn.LinearBits(w_bits=4, a_bits=8)
>>> rows, total = qnn.QuantizedRMSNorm(64, bits)(torch.randn(2, 8, 64))
>>> y = qnn.QATLinear(64, 32, bits=bits)(rows)
"""

from ..autocast import autocast_input
from .adoption import become
from .linear import LinearBits, QATLinear, TakesRows
from .norm import QuantizedRMSNorm, RMSNorm
from .rotary import QuantizedKV
from .rows import GatedRows, QuantizedRows
from .swiglu import QuantizedSwiGLU
from .weight_codes import QuantizedWeight, WeightCodes, whole_step

__all__ = [
    "GatedRows",
    "LinearBits",
    "QATLinear",
    "QuantizedKV",
    "QuantizedRMSNorm",
    "QuantizedRows",
    "QuantizedSwiGLU",
    "QuantizedWeight",
    "RMSNorm",
    "TakesRows",
    "WeightCodes",
    "autocast_input",
    "become",
    "whole_step",
]
