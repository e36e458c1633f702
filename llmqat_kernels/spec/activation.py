"""SiLU(gate) * up, alone and fused with quantization: spec 14."""

from __future__ import annotations

import torch
from torch import Tensor

from .math import exp
from .quantize import quantize


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of equal shapes and dtypes, in that dtype (spec 14).

    Below -88 the exponential is inf and SiLU is -0; a gate of -inf gives NaN, as in plain torch.
    """
    wide = gate.to(torch.float32)
    denominator = torch.ones_like(wide) + exp(-wide)
    silu = torch.div(wide, denominator).to(gate.dtype).to(torch.float32)
    return (silu * up.to(torch.float32)).to(gate.dtype)


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``quantize(silu_mul(gate, up))`` -> (codes [..., K], scale [...]) (spec 14)."""
    return quantize(silu_mul(gate, up), bits)


def silu_mul_quantize_train(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: (y [..., K], codes [..., K], scale [...]) (spec 14)."""
    y = silu_mul(gate, up)
    codes, scale = quantize(y, bits)
    return y, codes, scale
