"""The trained linear of the method (`QATLinear`); `quantized_linear` has the packed one.

Both compute spec 7 or 18 through `llmqat_kernels`, so for the same weights, inputs and dtype their
outputs are equal bit for bit (with 16-bit activations both are float products of the same
dequantized weight).

Autocast: the operators do not know about it, so both modules cast a float input to the autocast
dtype first, as `nn.Linear` does, and return that dtype. The weight is quantized from its own
precision (fp32 masters), never from an autocast copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.config import QATConfig, QuantSpec
from llmqat.errors import ConfigError
from llmqat.nn.quantizers import SCALE_DTYPES, fake_quantize
from llmqat_kernels import nn as qnn
from llmqat_kernels.checks import check_integer_scales

INPUT_SCALE = "input_scale"
"""The learned scale of a linear whose activation quantizer is `lsq`: a parameter, fp32 [1], 0 until
a first input sets it; also its name in checkpoints."""
_OFF = QuantSpec(16)


@dataclass(frozen=True)
class LinearSpec:
    """What one linear does: weights [N, K] per row or group, inputs per token, and outputs per
    token.

    `output` is the `paper` KV mode on k_proj and v_proj: the whole output row of a token, which
    holds all KV heads before RoPE, is one row of `quantize` (spec 9).
    """

    weight: QuantSpec
    activation: QuantSpec
    output: QuantSpec = _OFF
    ste_clip: float | None = None

    @classmethod
    def from_config(cls, config: QATConfig, *, is_kv: bool = False) -> LinearSpec:
        """The linear of a model quantized by `config`; `is_kv` marks k_proj and v_proj."""
        paper_kv = is_kv and config.kv_mode == "paper"
        output = config.kv if paper_kv else _OFF
        return cls(config.weight, config.activation, output, config.ste_clip)

    @property
    def enabled(self) -> bool:
        """Whether the linear differs from a plain one."""
        return self.weight.enabled or self.activation.enabled or self.output.enabled

    @property
    def is_integer(self) -> bool:
        """Whether the product is one of int8 codes (spec 7); else one of floats."""
        whole_tokens = self.activation.group_size == -1
        return self.weight.has_codes and self.activation.has_codes and whole_tokens

    @property
    def learns_scale(self) -> bool:
        """Whether the input has a learned scale (spec 22)."""
        return self.activation.enabled and self.activation.quantizer == "lsq"

    @property
    def scale_dtype(self) -> torch.dtype:
        """Precision to which weight scales are rounded."""
        return SCALE_DTYPES[self.weight.scale_dtype]

    @property
    def bits(self) -> qnn.LinearBits:
        """Widths and options of the integer product, where both operands are quantized."""
        weight = self.weight
        return qnn.LinearBits(
            weight.bits, self.activation.bits, weight.group_size, self.scale_dtype, self.ste_clip
        )

    def describe(self) -> str:
        """`W4A8`, with group sizes, the output bits and other quantizers where there are any."""
        weight, activation = self.weight, self.activation
        text = f"W{weight.bits}A{activation.bits}"
        if weight.group_size != -1:
            text += f" g{weight.group_size}"
        if weight.integer_scales:
            text += " integer scales"
        if activation.group_size != -1:
            text += f" {activation.group_axis} g{activation.group_size}"
        if self.output.enabled:
            text += f" out{self.output.bits}"
        for kind, part in (("w", weight), ("a", activation), ("out", self.output)):
            if part.enabled and part.quantizer != "symmetric":
                text += f" {kind}:{part.quantizer}"
        return text + (" official" if weight.numerics == "official" else "")


def quantize_output(y: Tensor, spec: LinearSpec) -> Tensor:
    """y [..., N] on the grid of the linear's output, or y itself."""
    return fake_quantize(y, spec.output, ste_clip=spec.ste_clip)


def _check_integer_scales(in_features: int, spec: LinearSpec) -> None:
    if not spec.is_integer:
        raise ConfigError(
            "weight_scale_dtype: integer scales need a product of codes; quantize the inputs too,"
            " or use 'bfloat16'"
        )
    try:
        check_integer_scales(in_features, spec.weight.bits, spec.weight.group_size)
    except qk.InvalidArgument as error:
        raise ConfigError(str(error)) from error


class QATLinear(qnn.QATLinear):
    """The trained linear of `llmqat_kernels.nn`, with every setting of the method (spec 6, 7) and
    of its comparisons (spec 20-24): weights or activations left in floats, quantizers without an
    integer product, and the output quantizer of the `paper` KV mode.

    With the activation quantizer `lsq` it has one more parameter, `input_scale` fp32 [1]; 0 until
    the first input sets it.
    """

    PLAIN: ClassVar[type[nn.Module]] = nn.Linear
    """The class that it is made from."""
    spec: LinearSpec
    input_scale: nn.Parameter
    _scale_is_set: bool

    @classmethod
    def adopt(cls, linear: nn.Linear, spec: LinearSpec) -> QATLinear:  # type: ignore[override]
        """Turn `linear` itself into a QATLinear: same object, parameters, hooks and names (and
        `input_scale` where there is a learned scale).

        Raises:
            ConfigError: not exactly an `nn.Linear`, a group size does not divide its columns, or
                integer scales without what they need (spec 18).
        """
        if type(linear) is not cls.PLAIN:
            raise ConfigError(
                f"expected a plain nn.{cls.PLAIN.__name__}, found {type(linear).__name__}"
            )
        for name, part in (("group_size", spec.weight), ("a_group_size", spec.activation)):
            group = part.group_size
            if part.enabled and group != -1 and linear.in_features % group:
                raise ConfigError(
                    f"{name}: {group} does not divide the {linear.in_features} input columns"
                )
        if spec.weight.integer_scales:
            _check_integer_scales(linear.in_features, spec)
        adopted = qnn.become(linear, cls, spec=spec, _weight_codes=qnn.WeightCodes())
        if spec.learns_scale:
            adopted._scale_is_set = False
            adopted.input_scale = nn.Parameter(torch.zeros(1, device=linear.weight.device))
        return adopted

    @property
    def bits(self) -> qnn.LinearBits:
        """Widths and options of the integer product."""
        return self.spec.bits

    def forward(self, x: Tensor | qnn.QuantizedRows | qnn.GatedRows) -> Tensor:
        """x float [..., K] or rows of that shape -> [..., N] in x's dtype (for a float x under
        autocast: the autocast dtype).
        """
        spec = self.spec
        if spec.is_integer:
            y = super().forward(x)
        else:
            y = self._float_forward(qnn.autocast_input(x))
        return quantize_output(y, spec)

    def _float_forward(self, x: Tensor) -> Tensor:
        """A float product of fake-quantized values."""
        spec, clip = self.spec, self.spec.ste_clip
        weight = self.fake_quantized_weight(x.dtype)
        x = fake_quantize(x, spec.activation, ste_clip=clip, learned_scale=self._learned_scale(x))
        return F.linear(x, weight, self.bias)

    def fake_quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The values [N, K] of the weight on its grid, in `dtype`; carries the gradient (integer
        scales have none here: training multiplies their codes).

        Raises:
            ConfigError: integer scales, and autograd would follow the weight.
        """
        spec, weight = self.spec, self.weight
        if not spec.weight.enabled:
            return weight
        if spec.weight.numerics == "official":
            weight = weight.to(dtype)  # the released code keeps no other copy of it
        return fake_quantize(weight, spec.weight, ste_clip=spec.ste_clip).to(dtype)

    def _learned_scale(self, x: Tensor) -> Tensor | None:
        """The scale of the quantizer `lsq`, set from x if none was; None for other quantizers."""
        if not self.spec.learns_scale:
            return None
        if not self._scale_is_set:
            with torch.no_grad():
                if not bool(self.input_scale.any()):
                    first = qk.lsq_scale(x, self.spec.activation.bits)
                    if not bool(torch.isfinite(first).all()):
                        return first  # NaN values for this input; the next one may set the scale
                    self.input_scale.copy_(first)
            self._scale_is_set = True
        return self.input_scale

    def _apply(self, fn: Any, recurse: bool = True) -> QATLinear:
        scale = self._parameters.get(INPUT_SCALE)
        kept = None if scale is None else scale.data
        super()._apply(fn, recurse)
        if kept is not None and self.input_scale.dtype != torch.float32:
            # `.to(bfloat16)` is meant for weights; steps of a learned scale are finer than that.
            self.input_scale.data = kept.to(self.input_scale.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.spec.learns_scale:
            self._scale_is_set = False

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self.spec.describe()}"


def clear_weight_cache(model: nn.Module) -> None:
    """Forget the weight codes of every QATLinear, after writing weights behind autograd's back
    (`weight.data`).
    """
    for module in model.modules():
        if isinstance(module, QATLinear):
            module.clear_cache()


def initialize_scales(model: nn.Module, input_ids: Tensor) -> None:
    """Set every learned scale that is not set yet from one forward pass over `input_ids` int64
    [B, T], without gradient.

    The first forward of training would do the same; before it, all processes of a distributed run
    see the same batch, and no parameter is sharded yet.
    """
    layers = [m for m in model.modules() if isinstance(m, QATLinear) and m.spec.learns_scale]
    if all(bool(layer.input_scale.any()) for layer in layers):
        return
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(input_ids=input_ids.to(layers[0].weight.device), use_cache=False)
    model.train(was_training)
