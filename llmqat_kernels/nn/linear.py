"""The trained linear: integer forward, straight-through backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

import llmqat_kernels as qk

from ..autocast import autocast_input
from ..checks import check_bits, check_group_size, check_integer_scales
from ..errors import InvalidArgument, InvalidArgumentType
from .adoption import become
from .rows import GatedRows, QuantizedRows
from .weight_codes import QuantizedWeight, WeightCodes

SCALE_DTYPES = (torch.bfloat16, torch.float32, torch.uint8)
FLOAT_BITS = (16, 32)
"""How settings write an operand that is not quantized."""


@dataclass(frozen=True)
class LinearBits:
    """How one linear is quantized (spec 3, 6, 7).

    Args:
        w_bits: weights [N, K], 2..8. a_bits: inputs, per token, 2..8.
        group_size: columns of a weight that share a scale; -1 for the whole row.
        scale_dtype: precision to which weight scales are rounded, bfloat16 or float32; or uint8:
            a group's scale is a whole multiple, 1 to 63, of one bfloat16 scale a row (spec 18), so
            that a product is one integer sum. Groups and w_bits of at most 4 only.
        ste_clip: gradients are zero where |x| >= ste_clip; None passes all.

    Raises:
        InvalidArgument, InvalidArgumentType: w_bits or a_bits that are no integers of 2..8; 16 and
            32 describe floats, which no linear here takes.
    """

    w_bits: int
    a_bits: int
    group_size: int = -1
    scale_dtype: torch.dtype = torch.bfloat16
    ste_clip: float | None = None

    def __post_init__(self) -> None:
        for name, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits)):
            if bits not in FLOAT_BITS:
                check_bits(name, bits)

    @property
    def integer_scales(self) -> bool:
        """Whether the scales of groups are integers."""
        return self.scale_dtype == torch.uint8

    @property
    def needs_values(self) -> bool:
        """Whether backward compares the input's values with ``ste_clip``."""
        return self.ste_clip is not None


class TakesRows(Protocol):
    """A linear that reads codes: :class:`QATLinear`, or a packed one."""

    @property
    def bits(self) -> LinearBits:
        """What it wants to be fed."""

    def __call__(self, x: Tensor | QuantizedRows | GatedRows, /) -> Tensor:
        """[..., K] -> [..., N]."""


class QATLinear(nn.Linear):
    """An `nn.Linear` that trains through quantization; parameters and their names are unchanged.

    It saves the int8 codes of its input for backward and nothing else; the weight's codes are
    computed once per optimizer step (:class:`WeightCodes`).

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`.
        bits: widths and options.

    Raises:
        InvalidArgumentType: bits that are no :class:`LinearBits`.
        InvalidArgument: bits out of 2..8, a group size that does not divide the columns, or integer
            scales without groups, with more than 4 bits or 38,342 columns.
    """

    _bits: LinearBits
    _weight_codes: WeightCodes

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: LinearBits,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(in_features, bits)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._bits = bits
        self._weight_codes = WeightCodes()

    @classmethod
    def adopt(cls, linear: nn.Linear, bits: LinearBits) -> Self:
        """Turn `linear` itself into a QATLinear: same object, parameters, hooks and names.

        Raises:
            InvalidArgumentType: not exactly an `nn.Linear`, or as the constructor. InvalidArgument:
                as the constructor.
        """
        if type(linear) is not nn.Linear:
            raise InvalidArgumentType(
                f"linear: expected a plain nn.Linear, got {type(linear).__name__}"
            )
        _check(linear.in_features, bits)
        return become(linear, cls, _bits=bits, _weight_codes=WeightCodes())

    @property
    def bits(self) -> LinearBits:
        """Widths and options."""
        return self._bits

    def weight_codes(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scales fp32 [N] or [N, K / group_size] of the current weight (spec
        3, 4, 18).
        """
        quantized = self.quantized_weight()
        return quantized.codes, quantized.scales

    def quantized_weight(self) -> QuantizedWeight:
        """The current weight as the product takes it."""
        if not torch.compiler.is_compiling() and self._weight_codes.keep and _is_gathered(self):
            self.keep_codes(False)
        bits = self.bits
        return self._weight_codes.get(self.weight, bits.w_bits, bits.group_size, bits.scale_dtype)

    def clear_cache(self) -> None:
        """Forget the weight codes, after writing the weight behind autograd's back."""
        self._weight_codes.clear()

    def keep_codes(self, keep: bool) -> None:
        """Whether to compute the weight's codes once per optimizer step (the default) or in every
        forward: for weights that exist only during a forward. Under FSDP it is always the latter.
        """
        self.clear_cache()
        self._weight_codes.keep = keep

    def forward(self, x: Tensor | QuantizedRows | GatedRows) -> Tensor:
        """x float [..., K] or rows of that shape -> [..., N] in x's dtype (for a float x under
        autocast: the autocast dtype).

        Raises:
            InvalidArgumentType: x of another type. InvalidArgument: rows of other bits than this
                linear's a_bits.
        """
        if not isinstance(x, (Tensor, QuantizedRows, GatedRows)):
            raise InvalidArgumentType(
                f"x: expected a Tensor or QuantizedRows, got {type(x).__name__}; a QuantizedRMSNorm"
                " returns (rows, sum)"
            )
        bits = self.bits
        w = self.quantized_weight()
        parameters = self.weight, self.bias
        options: dict[str, Any] = {
            "w_codes": w.codes,
            "w_scale": w.scale,
            "group_size": bits.group_size,
            "ste_clip": bits.ste_clip,
        }
        if isinstance(x, Tensor):
            x = autocast_input(x)
            if w.multiplier is None:
                return qk.qat_linear(
                    x, *parameters, w_bits=bits.w_bits, a_bits=bits.a_bits, **options
                )
            x = QuantizedRows.quantize(x, bits.a_bits)
        options["w_multiplier"] = w.multiplier
        if isinstance(x, GatedRows):
            return qk.silu_mul_qat_matmul(*x, *parameters, a_bits=bits.a_bits, **options)
        x.check_bits(bits.a_bits)
        return qk.qat_matmul(x.values, x.codes, x.scale, *parameters, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, W{self.bits.w_bits}A{self.bits.a_bits}"

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a change of it forgets the weight codes. Around an evaluation weights are
        often swapped behind autograd's back (`p.data.copy_(ema)`).
        """
        if mode != self.training:
            self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.clear_cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)


def check_linear_bits(bits: object) -> None:
    """InvalidArgumentType: not a :class:`LinearBits` (a bare number)."""
    if not isinstance(bits, LinearBits):
        raise InvalidArgumentType(f"bits: expected LinearBits, got {type(bits).__name__}")


def _check(in_features: int, bits: LinearBits) -> None:
    check_linear_bits(bits)
    check_bits("w_bits", bits.w_bits)
    check_bits("a_bits", bits.a_bits)
    check_group_size(in_features, bits.group_size)
    if bits.scale_dtype not in SCALE_DTYPES:
        raise InvalidArgument(
            f"scale_dtype: {bits.scale_dtype} is not supported; use bfloat16, float32 or uint8"
        )
    if bits.integer_scales:
        check_integer_scales(in_features, bits.w_bits, bits.group_size)


def _is_gathered(module: nn.Module) -> bool:
    """Whether FSDP or `replicate` manages the parameters of `module`.

    They gather a weight into the same tensor before each forward, past its version counter. torch
    marks the modules for its compiler (`fully_shard` and the FSDP before it); `replicate` leaves
    only the hook by which it follows `load_state_dict`.
    """
    if "_is_fsdp_managed_module" in module.__dict__:
        return True
    hooks = module._load_state_dict_post_hooks
    return bool(hooks) and any(
        (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")
        for hook in hooks.values()
    )
