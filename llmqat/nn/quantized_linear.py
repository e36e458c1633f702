"""The packed linear: codes instead of a weight (spec 7, 8, 18)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.config import QuantSpec
from llmqat.errors import ConfigError
from llmqat.nn.linear import LinearSpec, QATLinear, quantize_output
from llmqat_kernels import nn as qnn
from llmqat_kernels.checks import check_same_device
from llmqat_kernels.spec.quantize import are_integer_scales, group_scales, split_group_scales

BUFFERS = ("weight_codes", "weight_scale", "weight_multiplier")


def held_scales(scales: Tensor, weight: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """What a packed linear holds of scales fp32 [N] or [N, groups]: `weight_scale`, and
    `weight_multiplier` if there is one.

    Raises:
        ConfigError: `weight` has integer scales, and these are none.
    """
    if not weight.integer_scales:
        return scales, None
    if not are_integer_scales(scales):
        raise ConfigError(
            "scale: not whole multiples of one bfloat16 number a row, the largest 63, as integer"
            " scales are; take those of quantize_integer_groups"
        )
    multiplier, scale = split_group_scales(scales)
    return scale, multiplier


class QuantizedLinear(nn.Module):
    """A linear that holds codes instead of a weight; inference only (spec 7, 8).

    Buffers: `weight_codes` int8 [N, K], or for 4 bits packed uint8 [N, ceil(K / 2)]; `weight_scale`
    fp32 [N] or [N, K / group_size], which stays fp32 through `.to(dtype)`; with integer scales [N],
    and `weight_multiplier` uint8 [N, K / group_size] (spec 18). `bias` is a parameter [N] or None.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_multiplier: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LinearSpec,
        *,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        multiplier: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_multiplier", multiplier)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, spec: LinearSpec, *, bias: Tensor | None = None
    ) -> QuantizedLinear:
        """From int8 codes [N, K] and scales fp32 [N] or [N, groups]; 4-bit codes are packed, two a
        byte.

        Raises:
            ConfigError: integer scales are asked for, and `scale` has others.
        """
        n, k = codes.shape
        stored = qk.pack_int4(codes) if spec.weight.bits == 4 else codes
        row, multiplier = held_scales(scale, spec.weight)
        return cls(k, n, spec, bias=bias, codes=stored, scale=row, multiplier=multiplier)

    @classmethod
    def from_qat(cls, linear: QATLinear) -> QuantizedLinear:
        """The packed form of a trained linear: exactly the codes and scales that its forward uses.

        Raises:
            ConfigError: the weight has NaN or infinite values.
        """
        codes, scale, _ = quantized = linear.quantized_weight()
        if not bool(torch.isfinite(scale).all()):
            raise ConfigError("weight has NaN or infinite values; such a layer cannot be converted")
        scales = quantized.scales.clone()
        converted = cls.from_codes(codes.clone(), scales, linear.spec, bias=linear.bias)
        converted.train(linear.training)
        return converted

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        spec: LinearSpec,
        *,
        bias_dtype: torch.dtype | None,
    ) -> QuantizedLinear:
        """Buffers without data, on the default device (a loader's meta device); `bias_dtype` None
        for no bias.
        """
        packed = spec.weight.bits == 4
        columns = (in_features + 1) // 2 if packed else in_features
        grouped, integer = spec.weight.group_size != -1, spec.weight.integer_scales
        shape = (out_features, *((in_features // spec.weight.group_size,) if grouped else ()))
        return cls(
            in_features,
            out_features,
            spec,
            bias=None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype),
            codes=torch.empty((out_features, columns), dtype=torch.uint8 if packed else torch.int8),
            scale=torch.empty(shape[:1] if integer else shape, dtype=torch.float32),
            multiplier=torch.empty(shape, dtype=torch.uint8) if integer else None,
        )

    def int8_codes(self) -> Tensor:
        """Unpacked codes int8 [N, K]."""
        if self.weight_codes.dtype == torch.uint8:
            return qk.unpack_int4(self.weight_codes, self.in_features)
        return self.weight_codes

    @property
    def scales(self) -> Tensor:
        """What a code is multiplied by, fp32 [N] or [N, K / group_size]."""
        return group_scales(self.weight_scale, self.weight_multiplier)

    def quantized_weight(self) -> qnn.QuantizedWeight:
        """Unpacked codes with their scales."""
        return qnn.QuantizedWeight(self.int8_codes(), self.weight_scale, self.weight_multiplier)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for (spec 5)."""
        return qk.dequantize(
            self.int8_codes(),
            self.scales,
            group_size=self.spec.weight.group_size,
            dtype=dtype,
        )

    @property
    def bits(self) -> qnn.LinearBits:
        """Widths and options of the integer product."""
        return self.spec.bits

    def forward(self, x: Tensor | qnn.QuantizedRows | qnn.GatedRows) -> Tensor:
        """x float [..., K] or rows of that shape -> [..., N] in x's dtype (for a float x under
        autocast: the autocast dtype).
        """
        spec = self.spec
        if isinstance(x, Tensor):
            x = qnn.autocast_input(x)
            if spec.weight.integer_scales:
                x = qnn.QuantizedRows.quantize(x, spec.activation.bits)
        if isinstance(x, qnn.GatedRows):
            x = x.quantize(spec.activation.bits)
        if isinstance(x, qnn.QuantizedRows):
            return quantize_output(self._product(x), spec)
        y = qk.quantized_linear(
            x,
            self.weight_codes,
            self.weight_scale,
            self.bias,
            w_bits=spec.weight.bits,
            a_bits=spec.activation.bits,
            group_size=spec.weight.group_size,
        )
        return quantize_output(y, spec)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias},"
            f" {self.spec.describe()}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            # `.to(bfloat16)` is meant for the float tensors of a model; a rounded scale would be
            # another grid.
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _product(self, rows: qnn.QuantizedRows) -> Tensor:
        """The product of codes; like that of floats it has no gradient, and says so in backward."""
        weight, ops = self.spec.weight, torch.ops.llmqat
        rows.check_bits(self.spec.activation.bits)
        if rows.codes.shape[-1] != self.in_features:
            raise qk.InvalidArgument(
                f"x: expected rows of {self.in_features} features, got {rows.codes.shape[-1]}"
            )
        check_same_device(x=rows.codes, weight_codes=self.weight_codes)
        codes, dtype = (rows.codes, rows.scale, self.weight_codes), rows.values.dtype
        if self.weight_multiplier is None:
            options = self.weight_scale, self.bias, weight.bits, weight.group_size, dtype
            y = ops.quantized_matmul(*codes, *options)
        else:
            options = self.weight_multiplier, self.weight_scale, self.bias, weight.group_size, dtype
            y = ops.integer_group_matmul(*codes, *options)
        if torch.is_grad_enabled() and rows.values.requires_grad:
            y = _NoGradient.apply(y, rows.values)
        return y


class _NoGradient(torch.autograd.Function):
    """Ties a result to what it was computed from, so that backward fails instead of skipping it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, values: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "a converted linear has no gradient: it is an inference form; call it under"
            " torch.no_grad()"
        )
