"""The linears of GPT-2: transformers' `Conv1D`, y = x @ W + b with W [K, N], not [N, K].

A prepared one keeps its parameter as it is (so checkpoints, optimizers and transformers read and
write it as before) and shows the transpose as `weight`: rows are output channels again, and
everything a `QATLinear` does holds unchanged. A converted one is an ordinary `QuantizedLinear`:
codes have one layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmqat.models.compat import Conv1D
from llmqat.nn.linear import LinearSpec, QATLinear

__all__ = ["QATConv1D", "adopt_linear", "row_weight"]


class QATConv1D(QATLinear):
    """A `Conv1D` that trains through quantization; parameters and their names are unchanged.

    `weight` is a view [N, K] of the parameter [K, N]: gradients and in-place writes reach it.
    """

    PLAIN = Conv1D
    in_features: int
    out_features: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as rows of output channels, [N, K]."""
        return self._parameters["weight"].t()  # type: ignore[union-attr]

    @classmethod
    def adopt(cls, linear: nn.Module, spec: LinearSpec) -> QATLinear:  # type: ignore[override]
        """Turn the Conv1D `linear` itself into a QATConv1D: same object, parameters, hooks, names.

        Raises:
            ConfigError: not exactly a `Conv1D`, or the group size does not divide its K rows.
        """
        if type(linear) is Conv1D:
            linear.in_features, linear.out_features = linear.nx, linear.nf  # type: ignore[assignment]
        return super().adopt(linear, spec)  # type: ignore[arg-type]

    def fake_quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """As the base class; in the memory layout of a packed linear, so that float products of
        both give the same bits.
        """
        return super().fake_quantized_weight(dtype).contiguous()


def adopt_linear(linear: nn.Module, spec: LinearSpec) -> QATLinear:
    """Turn a plain linear of a family, `nn.Linear` or `Conv1D`, into its trained form, in place."""
    if type(linear) is Conv1D:
        return QATConv1D.adopt(linear, spec)
    return QATLinear.adopt(linear, spec)  # type: ignore[arg-type]


def row_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a plain or prepared linear; of a Conv1D a view of its parameter."""
    weight: Any = linear.weight
    return weight.t() if type(linear) is Conv1D else weight
