"""What a producer hands to the linears that read it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import llmqat_kernels as qk

from ..autocast import autocast_input
from ..errors import InvalidArgument


class QuantizedRows(NamedTuple):
    """A float tensor [..., K] as its consumers see it (spec 19).

    Attributes:
        values: float [..., K]; carries shape, dtype and gradient. Its numbers are those of the
            codes, or absent: one stored NaN, expanded (a gradient handle).
        codes: int8 [..., K]. scale: fp32 [...]. bits: of the codes, 2..8.
    """

    values: Tensor
    codes: Tensor
    scale: Tensor
    bits: int

    def check_bits(self, a_bits: int) -> None:
        """InvalidArgument: a linear whose inputs have ``a_bits`` cannot read these."""
        if self.bits != a_bits:
            raise InvalidArgument(
                f"x: rows of {self.bits} bits, but this linear has a_bits {a_bits}; give it and the"
                " producer the same"
            )

    @classmethod
    def quantize(cls, x: Tensor, bits: int) -> QuantizedRows:
        """Codes of a float x [..., K] that several linears will read; the gradient goes straight
        through to x (spec 6).
        """
        x = autocast_input(x)
        return cls(x, *qk.quantize(x.detach(), bits), bits)


class GatedRows(NamedTuple):
    """``silu(gate) * up`` for the one linear that reads it, not computed yet (spec 14): backward
    needs gate and up, so that linear keeps no codes beside them.

    Attributes:
        gate, up: float [..., K].
    """

    gate: Tensor
    up: Tensor

    def quantize(self, bits: int, *, values: bool = False) -> QuantizedRows:
        """Its codes; without ``values`` they come with a gradient handle."""
        return QuantizedRows(*qk.silu_mul_quantize_train(*self, bits, values=values), bits)
