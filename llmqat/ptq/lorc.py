"""LoRC: a low-rank correction of the weights' rounding errors, for evaluation.

ZeroQuant-V2 (Yao et al. 2023, section 5) keeps, beside each quantized weight W', a float product
B A of rank r that is the best approximation of W - W': y = Q(x) W'^T + (x A^T) B^T. The packed
format has no place for B and A, so such a model is measured (`llmqat eval --rank`) and cannot be
saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.config import QuantSpec
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_linears
from llmqat.nn.conv1d import row_weight
from llmqat.nn.linear import LinearSpec
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.ptq.checks import check_count
from llmqat.state import PACKED, state_of

__all__ = ["CompensatedLinear", "check_rank", "compensate", "float_weights"]


class CompensatedLinear(nn.Module):
    """A packed linear plus a float branch of low rank; quantized outputs are those of the sum."""

    def __init__(self, linear: QuantizedLinear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.spec: LinearSpec = linear.spec
        self.linear = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            dataclasses.replace(linear.spec, output=QuantSpec(16)),
            bias=linear.bias,
            codes=linear.weight_codes,
            scale=linear.weight_scale,
            multiplier=linear.weight_multiplier,
        )
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        """x float [..., K] -> [..., N]."""
        low = (x.to(self.down.dtype) @ self.down.T) @ self.up.T
        y = self.linear(x)
        y = y + low.to(y.dtype)
        if not self.spec.output.enabled:
            return y
        return qk.fake_quantize(y, self.spec.output.bits)


def float_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies [N, K] of the weights that a method will quantize, by full name."""
    return {
        name: row_weight(module).detach().clone()
        for name, _, module in iter_linears(model, find_family(model))
    }


def check_rank(model: nn.Module, rank: int) -> None:
    """ConfigError unless every linear of a plain or packed model has that many ranks."""
    check_count("rank", rank, 1)
    family = find_family(model)
    for name, _, linear in iter_linears(model, family):
        packed = isinstance(linear, QuantizedLinear)
        n, k = (
            (linear.out_features, linear.in_features) if packed else tuple(row_weight(linear).shape)
        )
        if rank > min(n, k):
            raise ConfigError(f"rank: {rank} is more than {name} has ({n} x {k})")


@torch.no_grad()
def compensate(model: nn.Module, weights: Mapping[str, Tensor], rank: int) -> nn.Module:
    """Give every packed linear a float branch of `rank` that approximates its weight's error.

    Args:
        model: a converted model.
        weights: the weights [N, K] that its codes stand for, as `float_weights` gave them.

    Returns:
        The model, changed in place: for `perplexity`, not for saving.

    Raises:
        ConfigError: not converted, a rank out of range, or a weight missing.
    """
    state = state_of(model)
    if state is None or state.stage != PACKED:
        raise ConfigError("model: not packed; quantize it first, then compensate")
    linears = list(iter_linears(model, find_family(model)))
    for name, _, linear in linears:
        if name not in weights:
            raise ConfigError(f"weights: {name} is missing; take float_weights(model) beforehand")
        if not isinstance(linear, QuantizedLinear):
            raise ConfigError(f"{name}: expected a QuantizedLinear; is it compensated already?")
    check_rank(model, rank)
    for name, _, linear in linears:
        error = weights[name].float().to(linear.weight_scale.device) - linear.dequantize()
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        root = s[:rank].sqrt()
        branch = CompensatedLinear(linear, root.unsqueeze(1) * vh[:rank], u[:, :rank] * root)
        model.set_submodule(name, branch.train(linear.training))
    return model
