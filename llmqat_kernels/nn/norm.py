"""RMSNorm as the specification defines it, alone and as a producer of codes."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

import llmqat_kernels as qk

from ..autocast import autocast_input
from ..errors import InvalidArgumentType
from .adoption import become
from .linear import LinearBits, check_linear_bits
from .rows import QuantizedRows


class _Norm(nn.Module):
    """A weight [K] of ones, and what is added to the mean square."""

    weight: nn.Parameter
    eps: float

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class RMSNorm(_Norm):
    """RMSNorm with an exactly specified sum (spec 12): the same bits on every backend and in
    serving. Saves its input for backward and nothing else.

    Args:
        size: K, the length of a row. eps: added to the mean square.
    """

    @classmethod
    def adopt(cls, norm: nn.Module, eps: float) -> Self:
        """Turn `norm`, any module whose only parameter is `weight` [K], into this class: same
        object, parameter, hooks and name.

        Raises:
            InvalidArgumentType: no such weight, or another parameter (a bias) that would not act.
        """
        _check_adoptable(norm)
        return become(norm, cls, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x float [..., K] -> [..., K] in x's dtype (the autocast dtype under autocast)."""
        return qk.rms_norm(autocast_input(x), self.weight, self.eps)


class QuantizedRMSNorm(_Norm):
    """RMSNorm (of a sum) whose result exists as codes only; every consumer shares them (spec 12,
    19).

    Args:
        size: K. bits: of the linears that read the result. eps: added to the mean square.

    Raises:
        InvalidArgumentType: bits that are no :class:`LinearBits`.
    """

    bits: LinearBits

    def __init__(
        self,
        size: int,
        bits: LinearBits,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_linear_bits(bits)
        super().__init__(size, eps, device=device, dtype=dtype)
        self.bits = bits

    @classmethod
    def adopt(cls, norm: nn.Module, bits: LinearBits, eps: float) -> Self:
        """Turn `norm`, any module whose only parameter is `weight` [K], into this class: same
        object, parameter, hooks and name.

        Raises:
            InvalidArgumentType: no such weight, another parameter (a bias) that would not act, or
                bits that are no :class:`LinearBits`.
        """
        _check_adoptable(norm)
        check_linear_bits(bits)
        return become(norm, cls, bits=bits, eps=eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[QuantizedRows, Tensor]:
        """x, residual float [..., K] -> the codes of ``rms_norm(x + residual)``, and the sum.

        Both are in x's dtype (the autocast dtype under autocast: the sum is then the stream to go
        on with).
        """
        y, codes, scale, total = qk.rms_norm_quantize_train(
            autocast_input(x),
            self.weight,
            self.eps,
            self.bits.a_bits,
            residual=None if residual is None else autocast_input(residual),
            values=self.bits.needs_values,
        )
        return QuantizedRows(y, codes, scale, self.bits.a_bits), total

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, A{self.bits.a_bits}"


def _check_adoptable(norm: nn.Module) -> None:
    """`norm` has the parameter `weight` [K] and no other: what is not read would not train."""
    kind, parameters = type(norm).__name__, dict(norm.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or weight.dim() != 1:
        raise InvalidArgumentType(f"norm: {kind} has no parameter weight [K]; give it one")
    if parameters:
        raise InvalidArgumentType(
            f"norm: {kind} has parameters besides weight ({', '.join(parameters)}), which an"
            " RMSNorm does not read; remove them"
        )
