"""The gated MLP on codes."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from ..errors import InvalidArgument, InvalidArgumentType
from .adoption import become
from .linear import TakesRows
from .rows import GatedRows, QuantizedRows

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FITTING = (
    (("gate_proj", "in"), ("up_proj", "in")),
    (("gate_proj", "out"), ("up_proj", "out")),
    (("gate_proj", "out"), ("down_proj", "in")),
)
"""Numbers of features that must be the same; a linear may lack the attribute."""


class QuantizedSwiGLU(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``: gate and up share the codes of x, and the
    product in between exists as codes only, which backward computes anew (spec 14, 19).

    Args:
        gate_proj, up_proj, down_proj: linears that take rows (:class:`QATLinear`); gate and up with
            the same a_bits and features, down reading as many.

    Raises:
        InvalidArgumentType: one of them takes no rows. InvalidArgument: a_bits of gate and up
            differ, or features that do not fit.
    """

    gate_proj: TakesRows
    up_proj: TakesRows
    down_proj: TakesRows

    def __init__(self, gate_proj: TakesRows, up_proj: TakesRows, down_proj: TakesRows) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        _check_projections(self)

    @classmethod
    def adopt(cls, mlp: nn.Module) -> Self:
        """Turn `mlp`, any module with children of these three names, into this class: same object,
        children, hooks and names.

        Raises:
            InvalidArgumentType: a child is missing or takes no rows. InvalidArgument: as the
                constructor.
        """
        _check_projections(mlp)
        return become(mlp, cls)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x float [..., K] or rows of that shape -> [..., N]."""
        if isinstance(x, Tensor):
            x = QuantizedRows.quantize(x, self.gate_proj.bits.a_bits)
        return self.down_proj(GatedRows(self.gate_proj(x), self.up_proj(x)))


def _check_projections(mlp: nn.Module) -> None:
    """The children of `mlp` take rows, gate and up the same ones, and their features fit."""
    children: list[Any] = [getattr(mlp, name, None) for name in PROJECTIONS]
    for name, child in zip(PROJECTIONS, children, strict=True):
        if not hasattr(child, "bits"):
            raise InvalidArgumentType(f"mlp: {name} is not a linear that takes rows; adopt it")
    gate, up = (child.bits.a_bits for child in children[:2])
    if gate != up:
        raise InvalidArgument(
            f"mlp: gate_proj has a_bits {gate} and up_proj {up}; they read the same codes, so give"
            " them the same"
        )
    for (first, its), (second, other) in FITTING:
        sizes = (
            getattr(getattr(mlp, first), f"{its}_features", None),
            getattr(getattr(mlp, second), f"{other}_features", None),
        )
        if None not in sizes and sizes[0] != sizes[1]:
            raise InvalidArgument(
                f"mlp: {first} has {its}_features {sizes[0]} and {second} {other}_features"
                f" {sizes[1]}; give them the same"
            )
