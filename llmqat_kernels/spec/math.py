"""exp, log and tree_sum, fixed to the last bit: spec 11 and 13.

Each line is one rounded fp32 operation (a multiply, then an add: never an FMA), so any backend that
performs the same operations gets the same bits. Accuracy: within 2 ulp of the true value.
The coefficients live here and in ``csrc/include/llmqat/fast_math.h``, nowhere else; they are
minimax fits (reweighted least squares on Chebyshev points in fp64, then rounded to fp32).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
LN2_HI = 0.693359375
"""ln 2 to 9 bits, so that ``n * LN2_HI`` is exact for every exponent n."""
LN2_LO = -2.1219444005469057e-4
EXP_LOW, EXP_HIGH = -87.0, 88.0
EXP_COEFFICIENTS = (
    1.381453825160861e-3,
    8.36874544620514e-3,
    4.166838899254799e-2,
    1.666652113199234e-1,
    4.999999403953552e-1,
    1.0,
    1.0,
)
"""Highest degree first: e^r on |r| <= ln(2) / 2."""
LOG_COEFFICIENTS = (
    -7.634429633617401e-2,
    1.2761549651622772e-1,
    -1.31601944565773e-1,
    1.4201761782169342e-1,
    -1.6623356938362122e-1,
    2.0001226663589478e-1,
    -2.50008225440979e-1,
    3.333333134651184e-1,
)
"""Highest degree first: (log(1 + f) - f + f^2 / 2) / f^3 on sqrt(1/2) - 1 <= f < sqrt(2) - 1."""
SQRT_HALF_BITS = 0x3F3504F3


def _fp32(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = _fp32(coefficients[0], x).expand_as(x)
    for coefficient in coefficients[1:]:
        value = value * x
        value = value + _fp32(coefficient, x)
    return value


def exp(x: Tensor) -> Tensor:
    """e^x of fp32 ``x``, same shape (spec 13): 0 below -87, inf above 88, NaN for NaN."""
    safe = torch.clamp(torch.nan_to_num(x), EXP_LOW, EXP_HIGH)
    n = torch.round(safe * _fp32(LOG2E, x))
    r = safe - n * _fp32(LN2_HI, x)
    r = r - n * _fp32(LN2_LO, x)
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    y = _horner(r, EXP_COEFFICIENTS) * power
    y = torch.where(x < EXP_LOW, torch.zeros_like(y), y)
    y = torch.where(x > EXP_HIGH, torch.full_like(y, float("inf")), y)
    return torch.where(torch.isnan(x), x, y)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of fp32 ``x``, which must be positive and normal; same shape (spec 13)."""
    bits = x.contiguous().view(torch.int32)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).view(torch.float32) - _fp32(1.0, x)
    exponent = e.to(torch.float32)
    z = f * f
    y = (f * z) * _horner(f, LOG_COEFFICIENTS)
    y = y + exponent * _fp32(LN2_LO, x)
    y = y - _fp32(0.5, x) * z
    y = f + y
    return y + exponent * _fp32(LN2_HI, x)


def tree_sum(x: Tensor) -> Tensor:
    """Sum of fp32 rows [..., K] -> [...] in the order of every backend (spec 11); 0 if K is 0."""
    length = x.shape[-1]
    if length == 0:
        return x.new_zeros(x.shape[:-1])
    power = 1 << (length - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, power - length))
    while power > 1:
        power //= 2
        x = x[..., :power] + x[..., power:]
    return x[..., 0]
