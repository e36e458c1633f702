"""The gated MLP on codes."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from ..errors import InvalidArgumentType
from .adoption import become
from .linear import TakesRows
from .rows import GatedRows, QuantizedRows


class QuantizedSwiGLU(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``: gate and up share the codes of x, and the
    product in between exists as codes only, which backward computes anew (spec 14, 19).

    Args:
        gate_proj, up_proj, down_proj: linears that take rows (:class:`QATLinear`).
    """

    gate_proj: TakesRows
    up_proj: TakesRows
    down_proj: TakesRows

    def __init__(self, gate_proj: TakesRows, up_proj: TakesRows, down_proj: TakesRows) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    @classmethod
    def adopt(cls, mlp: nn.Module) -> Self:
        """Turn `mlp`, any module with children of these three names, into this class: same object,
        children, hooks and names.

        Raises:
            InvalidArgumentType: a child is missing or takes no rows.
        """
        for name in ("gate_proj", "up_proj", "down_proj"):
            if not hasattr(getattr(mlp, name, None), "bits"):
                raise InvalidArgumentType(f"mlp: {name} is not a linear that takes rows; adopt it")
        return become(mlp, cls)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x float [..., K] or rows of that shape -> [..., N]."""
        if isinstance(x, Tensor):
            x = QuantizedRows.quantize(x, self.gate_proj.bits.a_bits)
        return self.down_proj(GatedRows(self.gate_proj(x), self.up_proj(x)))
