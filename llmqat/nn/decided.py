"""A prepared linear whose codes are chosen elsewhere: by GPTQ, or a checkpoint's own arithmetic."""

from __future__ import annotations

from torch import Tensor

from llmqat.nn.linear import QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat_kernels.nn import QuantizedWeight

__all__ = ["DecidedLinear"]


class DecidedLinear(QATLinear):
    """It computes, and `convert` packs it to, exactly the codes it was given."""

    @classmethod
    def decide(cls, linear: QATLinear, codes: Tensor, scale: Tensor) -> None:
        """Fix the codes of `linear` itself.

        Args:
            codes: int8 [N, K] in [-qmax, qmax]. scale: fp32 [N] or [N, K / group_size].

        Raises:
            ConfigError: integer scales are asked for, and `scale` has others.
        """
        packed = QuantizedLinear.from_codes(codes, scale, linear.spec, bias=linear.bias)
        linear.__class__ = cls
        # Not a submodule: the model's tensors and their names stay as they are.
        linear.__dict__["_packed"] = packed

    def quantized_weight(self) -> QuantizedWeight:
        packed: QuantizedLinear = self.__dict__["_packed"]
        return packed.quantized_weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["_packed"](x)  # type: ignore[no-any-return]
