"""The formulas of the specification as Triton device functions; every kernel composes these.

Twin of ``csrc/include/llmqat/quant_math.h`` and ``fast_math.h``; the constants come from ``spec/``.
Each line is one rounded fp32 operation. Kernels are compiled without contraction
(``launch.OPTIONS``), so no multiply and add become one FMA; divisions are ``div_rn``. The
exception, :func:`silu_of_16_bits`, is proven by trying every gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...spec import math as spec_math
from ...spec.quantize import ZERO_ROW_AMAX
from . import interpreting

INLINE_ASM = tl.constexpr(not interpreting())
"""The interpreter has no inline assembly; it takes the same formula in Triton operators."""
ZERO_AMAX = tl.constexpr(ZERO_ROW_AMAX)
INFINITY_BITS = tl.constexpr(0x7F800000)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds |v| <= 2^22 to an integer, ties to even, in the low bits."""
ROUND_BITS = tl.constexpr(0x4B400000)

LOG2E = tl.constexpr(spec_math.LOG2E)
LN2_HI = tl.constexpr(spec_math.LN2_HI)
LN2_LO = tl.constexpr(spec_math.LN2_LO)
EXP_LOW = tl.constexpr(spec_math.EXP_LOW)
EXP_HIGH = tl.constexpr(spec_math.EXP_HIGH)
EXP_COEFFICIENTS = tl.constexpr(spec_math.EXP_COEFFICIENTS)
LOG_COEFFICIENTS = tl.constexpr(spec_math.LOG_COEFFICIENTS)
EXP_TERMS = tl.constexpr(len(spec_math.EXP_COEFFICIENTS))
LOG_TERMS = tl.constexpr(len(spec_math.LOG_COEFFICIENTS))
SQRT_HALF_BITS = tl.constexpr(spec_math.SQRT_HALF_BITS)
LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)
SILU_LOW = tl.constexpr(-88.5)
"""fp16 and bf16 have no number between -88, below which the exponential of spec 14 is infinite, and
this one, at which (1 + e^88.5) / 2 exceeds 2^126, so that its inverse is flushed to 0."""
SILU_HIGH = tl.constexpr(30.0)
"""1 + e^-30 is 1."""


@triton.jit
def magnitude_bits(x):
    """Bits of |x| of fp32 x: they order like the values, and NaN is above infinity (spec 2)."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax_bits, QMAX: tl.constexpr, BF16_SCALE: tl.constexpr):
    """Scale of rows whose largest magnitude has these bits (spec 2, 3)."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, QMAX, tl.float32))
    if BF16_SCALE:
        scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = tl.where(amax < ZERO_AMAX, 1.0, scale)
    return tl.where(amax_bits >= INFINITY_BITS, float("nan"), scale)


@triton.jit
def inverse_of(scale):
    """``div_rn(1, scale)`` (spec 4)."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def has_codes(amax_bits, scale):
    """Whether a row has codes other than 0: finite and not a zero row (spec 2)."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    return (magnitude_bits(scale) < INFINITY_BITS) & (amax >= ZERO_AMAX)


@triton.jit
def round_to_integer(v):
    """fp32 v, |v| <= 2^22 -> int32, ties to even. v must come from a clamp, not from a product."""
    return (v + ROUND_TO_INTEGER).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def round_up(v):
    """fp32 v, |v| <= 2^22 -> int32, the next integer. `tl.ceil` is compiled to an instruction that
    flushes subnormals.
    """
    near = round_to_integer(v)
    return near + (near.to(tl.float32) < v).to(tl.int32)


@triton.jit
def codes_of(x, inverse, keep, QMAX: tl.constexpr, CLAMP: tl.constexpr):
    """int32 codes of fp32 x; ``inverse`` and ``keep`` broadcast against x (spec 4).

    Without ``CLAMP`` the scale has to be the quotient of the largest magnitude, not rounded again:
    then |x * inverse| <= QMAX * (1 + 2^-22), which rounds to QMAX at most.
    """
    # A row without codes has an empty range: nothing to select for each element, and the smaller
    # and the larger of NaN and a number are the number. Its inverse is NaN, or its x are tiny.
    limit = tl.where(keep, tl.full(keep.shape, QMAX, tl.float32), 0.0)
    v = x * inverse
    if CLAMP:
        v = tl.maximum(v, -limit)
    return round_to_integer(tl.minimum(v, limit))


@triton.jit
def exp(x):
    """e^x of fp32 x (spec 13)."""
    # NaN passes the clamp and every operation; its power is some finite number or infinity.
    safe = tl.maximum(x, EXP_LOW, propagate_nan=tl.PropagateNan.ALL)
    safe = tl.minimum(safe, EXP_HIGH, propagate_nan=tl.PropagateNan.ALL)
    shifted = safe * LOG2E + ROUND_TO_INTEGER
    n = shifted - ROUND_TO_INTEGER
    r = safe - n * LN2_HI
    r = r - n * LN2_LO
    y = tl.full(x.shape, EXP_COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, EXP_TERMS):
        y = y * r
        y = y + EXP_COEFFICIENTS[i]
    # n from the low bits: a conversion would run at an eighth of the rate.
    exponent = shifted.to(tl.int32, bitcast=True) - (ROUND_BITS - 127)
    y = y * (exponent << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < EXP_LOW, 0.0, y)
    return tl.where(x > EXP_HIGH, float("inf"), y)


@triton.jit
def negated(x):
    """-x of fp32 x: a modifier of the operand, where Triton's own minus is a subtraction from 0."""
    return x * -1.0


@triton.jit
def near_inverse(x):
    """1 / x of positive fp32 x within 1 ulp; 0 where that is subnormal."""
    if INLINE_ASM:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
        inverse = tl.where(inverse < LEAST_NORMAL, 0.0, inverse)
    return inverse


@triton.jit
def silu_of_16_bits(gate):
    """fp32 SiLU of gates that are fp16 or bf16 numbers, widened: once it is rounded to the gates'
    dtype, it is that of spec 14. +inf gives NaN.

    Less than half of the instructions: the exponential with FMAs, and no IEEE division. They
    change the result by an ulp of fp32, which no gate notices: each of the 65,536 was tried, with
    inverses up to 4 ulp off (tests/triton/test_silu_of_16_bits.py).
    """
    x = tl.minimum(tl.maximum(negated(gate), -SILU_HIGH), -SILU_LOW)
    # The exponent less 1 in the low bits: everything below is half of its value, in range.
    shifted = tl.fma(x, LOG2E, ROUND_TO_INTEGER - 1.0)
    n = shifted - (ROUND_TO_INTEGER - 1.0)
    r = tl.fma(n, -LN2_HI, x)
    r = tl.fma(n, -LN2_LO, r)
    y = tl.full(x.shape, EXP_COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, EXP_TERMS):
        y = tl.fma(y, r, EXP_COEFFICIENTS[i])
    # y is near 1 and the power in range, so the product is a sum of the bits.
    power = y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    denominator = power.to(tl.float32, bitcast=True) + 0.5
    inverse = near_inverse(denominator)
    half = 0.5 * gate
    quotient = half * inverse
    remainder = tl.fma(denominator, quotient, negated(half))
    return tl.fma(negated(remainder), inverse, quotient)


@triton.jit
def log(x):
    """Natural logarithm of positive normal fp32 x (spec 13)."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = e.to(tl.float32)
    z = f * f
    p = tl.full(x.shape, LOG_COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, LOG_TERMS):
        p = p * f
        p = p + LOG_COEFFICIENTS[i]
    y = (f * z) * p
    y = y + exponent * LN2_LO
    y = y - 0.5 * z
    y = f + y
    return y + exponent * LN2_HI


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Sum of each row of fp32 x [ROWS, SIZE], SIZE a power of two: always halves (spec 11).

    A sum of two numbers has one order, so the compiler's choice of layout cannot change a bit.
    """
    for level in tl.static_range(1, 31):
        if SIZE >> level > 0:
            x = tl.sum(tl.reshape(x, (ROWS, 2, SIZE >> level)), axis=1)
    return tl.reshape(x, (ROWS,))
