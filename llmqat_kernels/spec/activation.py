"""SiLU(gate) * up, alone and fused with quantization: spec 14."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .math import exp
from .quantize import gradient_handle, quantize


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


def silu_mul_quantize_train(
    gate: Tensor,
    up: Tensor,
    bits: int,
    values: bool = True,
    silu_mul_quantize: Callable[..., tuple[Tensor, Tensor]] = silu_mul_quantize,
    silu_mul: Callable[..., Tensor] = silu_mul,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: (y [..., K], codes [..., K], scale [...]) (spec 14).

    Without ``values``, y is a :func:`gradient_handle`.
    """
    codes, scale = silu_mul_quantize(gate, up, bits)
    return silu_mul(gate, up) if values else gradient_handle(gate), codes, scale


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), each [..., K] in the dtype of gate (spec 14)."""
    g, u, d = gate.to(torch.float32), up.to(torch.float32), grad.to(torch.float32)
    sigmoid = torch.sigmoid(g)
    dgate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(gate.dtype), (d * g * sigmoid).to(up.dtype)
