"""What is quantized and how: one frozen, validated configuration that drives prepare, convert and
export.

A setting such as ``4-8-4`` names the bits of weights, activations and KV cache (LLM-QAT section 3);
16 and 32 mean off. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmqat.errors import ConfigError

QUANTIZED_BITS = range(2, 9)
OFF_BITS = (16, 32)
KV_MODES = ("paper", "serving")
SCALE_DTYPES = ("bfloat16", "float32", "integer")
INTEGER_SCALE_BITS = 4
"""The most bits of a weight whose groups have integer scales (spec 18)."""
W_QUANTIZERS = ("symmetric", "asymmetric", "statsq")
A_QUANTIZERS = ("symmetric", "asymmetric", "lsq")
KV_QUANTIZERS = ("symmetric", "asymmetric")
NUMERICS = ("spec", "official")
A_GROUP_AXES = ("channel_over_tokens", "channel_per_token")
OFFICIAL_STE_CLIP = 2.0
"""The gradient mask of the released code, which `numerics="official"` imitates (spec 6)."""
OFFICIAL_STATSQ_BITS = 2
"""Weights of so many bits are StatsQ in the released code, all others min-max (spec 23)."""

PACKED_KV_BITS = (4, 8, *OFF_BITS)
"""KV widths that a cache can store; the other widths exist as fake quantization only."""


@dataclass(frozen=True)
class QuantSpec:
    """How one kind of tensor is quantized (spec 1-5, 20-24): bits, rows or groups of rows, rounding
    of the scale, quantizer, numerics, and what a group of activations spans.
    """

    bits: int
    group_size: int = -1
    scale_dtype: str = "float32"
    quantizer: str = "symmetric"
    numerics: str = "spec"
    group_axis: str = "channel_per_token"

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)
        _check_group_size("group_size", self.group_size, smallest=1)
        _check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        quantizers = tuple(dict.fromkeys(W_QUANTIZERS + A_QUANTIZERS))
        _check_choice("quantizer", self.quantizer, quantizers)
        _check_choice("numerics", self.numerics, NUMERICS)
        _check_choice("group_axis", self.group_axis, A_GROUP_AXES)

    @property
    def enabled(self) -> bool:
        """False for 32 bits, and for 16 unless in the released numerics, which have int16 codes."""
        return self.bits not in OFF_BITS or (self.numerics == "official" and self.bits == 16)

    @property
    def has_codes(self) -> bool:
        """Whether the values are int8 codes times one scale a row or group (spec 4): what integer
        products, packed checkpoints and KV caches hold.
        """
        return (
            self.bits not in OFF_BITS and self.quantizer == "symmetric" and self.numerics == "spec"
        )

    @property
    def integer_scales(self) -> bool:
        """Whether the scales of a row's groups are whole multiples of one number (spec 18)."""
        return self.scale_dtype == "integer"

    @property
    def qmax(self) -> int:
        """The largest code, ``2^(bits-1) - 1`` (spec 1); defined for enabled specs only."""
        if self.bits in OFF_BITS:
            raise ConfigError(
                f"bits: {self.bits} is not quantized and has no largest code; use 2..8"
            )
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class QATConfig:
    """The quantization of a whole model; the fields are stored with every checkpoint.

    Args:
        w_bits: weights, per output channel. 2..8, or 16 / 32 for off.
        a_bits: inputs of the linears, per token. 2..8, or 16 / 32 for off.
        kv_bits: keys and values. 2..8 in training; a packed KV cache holds 4 and 8; 16 / 32 for
            off.
        kv_mode: ``paper`` (before RoPE, one scale per token) or ``serving`` (after RoPE, per token
            and head); spec 9.
        group_size: columns of a weight that share a scale; -1 for the whole row.
        weight_scale_dtype: precision of weight scales; ``bfloat16`` (stored losslessly everywhere)
            or ``float32``; with groups also ``integer``: whole multiples, 1 to 63, of one bfloat16
            number a row, which make a product one integer sum (spec 18; w_bits of at most 4).
        ste_clip: gradients are zero where |x| >= ste_clip; None passes all (spec 6), and means 2.0
            with `numerics="official"`.
        w_quantizer: ``symmetric`` (Eq. 3), ``asymmetric`` (Eq. 1, spec 20) or ``statsq`` (clipped,
            spec 21).
        a_quantizer: ``symmetric``, ``asymmetric`` or ``lsq`` (clipped, learned scale; spec 22).
        kv_quantizer: ``symmetric`` or ``asymmetric``.
        numerics: ``spec``, or ``official``: imitates the arithmetic of the released code, which
            takes StatsQ for weights of 2 bits (spec 23).
        a_group_size: input channels that share a scale (W4A4 of table 8); -1 for whole tokens.
        a_group_axis: ``channel_over_tokens`` (one scale per group over all tokens of the tensor,
            spec 24) or ``channel_per_token`` (per token and group).

    Everything but symmetric quantizers, ``spec`` and whole tokens exists as fake quantization only:
    such a model trains and evaluates, but is never packed (:meth:`check_packable`).

    Raises:
        ConfigError: one line that names the field and the accepted values.
    """

    w_bits: int
    a_bits: int
    kv_bits: int
    kv_mode: str = "paper"
    group_size: int = -1
    weight_scale_dtype: str = "bfloat16"
    ste_clip: float | None = None
    w_quantizer: str = "symmetric"
    a_quantizer: str = "symmetric"
    kv_quantizer: str = "symmetric"
    numerics: str = "spec"
    a_group_size: int = -1
    a_group_axis: str = "channel_over_tokens"

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "kv_bits"):
            _check_bits(name, getattr(self, name))
        _check_choice("kv_mode", self.kv_mode, KV_MODES)
        _check_group_size("group_size", self.group_size)
        _check_choice("weight_scale_dtype", self.weight_scale_dtype, SCALE_DTYPES)
        _check_ste_clip(self.ste_clip)
        _check_choice("w_quantizer", self.w_quantizer, W_QUANTIZERS)
        _check_choice("a_quantizer", self.a_quantizer, A_QUANTIZERS)
        _check_choice("kv_quantizer", self.kv_quantizer, KV_QUANTIZERS)
        _check_choice("numerics", self.numerics, NUMERICS)
        _check_group_size("a_group_size", self.a_group_size, smallest=1)
        _check_choice("a_group_axis", self.a_group_axis, A_GROUP_AXES)
        _check_combination(self)
        if self.numerics == "official" and self.ste_clip is None:
            # Written out, so that every record of a run says what its gradients did.
            object.__setattr__(self, "ste_clip", OFFICIAL_STE_CLIP)

    @classmethod
    def parse(cls, setting: str, **fields: Any) -> QATConfig:
        """``QATConfig.parse("4-8-4", kv_mode="serving")``: W-A-KV bits, then fields by name."""
        parts = setting.split("-") if isinstance(setting, str) else []
        if len(parts) != 3 or not all(
            part.isascii() and part.isdigit() and len(part) <= 2 for part in parts
        ):
            raise ConfigError(
                f"bits: {_short(setting)} is not a W-A-KV setting; write three numbers such as"
                " 4-8-4"
            )
        return cls._build(
            dict(zip(("w_bits", "a_bits", "kv_bits"), map(int, parts), strict=True)), fields
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QATConfig:
        """The inverse of :meth:`to_dict`. Unknown and missing keys are errors."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"config: expected an object with fields, got {type(values).__name__}"
            )
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise ConfigError(f"config: missing {', '.join(missing)}")
        return cls._build({}, values)

    @classmethod
    def _build(cls, known: dict[str, Any], fields: Mapping[str, Any]) -> QATConfig:
        names = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in names or name in known:
                accepted = ", ".join(n for n in names if n not in known)
                raise ConfigError(f"config: unknown field {_short(name)}; accepted: {accepted}")
        return cls(**known, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        return dataclasses.asdict(self)

    def to_record(self) -> dict[str, Any]:
        """The values that a checkpoint stores, for :meth:`from_dict`: the fields that came after
        the first format only where they are not at their default, so that older versions read all
        other checkpoints.
        """
        later = {f.name: f.default for f in dataclasses.fields(self) if f.name in LATER_FIELDS}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in later or value != later[name]
        }

    @property
    def setting(self) -> str:
        """``"4-8-4"``: bits of weights, activations, KV cache."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def weight(self) -> QuantSpec:
        """The weights of the linears."""
        quantizer = self.w_quantizer
        if self.numerics == "official" and self.w_bits == OFFICIAL_STATSQ_BITS:
            quantizer = "statsq"
        return QuantSpec(
            self.w_bits, self.group_size, self.weight_scale_dtype, quantizer, self.numerics
        )

    @property
    def activation(self) -> QuantSpec:
        """The inputs of the linears."""
        return QuantSpec(
            self.a_bits,
            self.a_group_size,
            quantizer=self.a_quantizer,
            numerics=self.numerics,
            group_axis=self.a_group_axis,
        )

    @property
    def kv(self) -> QuantSpec:
        """Keys and values."""
        return QuantSpec(self.kv_bits, quantizer=self.kv_quantizer, numerics=self.numerics)

    @property
    def quantizes_linears(self) -> bool:
        """Whether any linear is changed by weight or activation quantization."""
        return self.weight.enabled or self.activation.enabled

    def check_packable(self) -> None:
        """Raise ConfigError unless a converted model can hold this setting."""
        self.check_codes("packed")
        if not self.weight.enabled:
            raise ConfigError(
                f"w_bits: {self.w_bits} leaves nothing to pack; convert needs 2..8, keep the"
                " prepared model"
            )
        if self.kv_bits not in PACKED_KV_BITS:
            raise ConfigError(
                f"kv_bits: {self.kv_bits} has no packed KV cache; convert accepts 4, 8, 16 or 32"
            )

    def check_codes(self, what: str) -> None:
        """Raise ConfigError unless all that is quantized is int8 codes times one scale a row or
        group of weights; `what` (an adjective) needs that.
        """
        for name, default in CODES_ONLY.items():
            value = getattr(self, name)
            if value != default:
                raise ConfigError(
                    f"{name}: {_short(value)} exists as fake quantization only and has no {what}"
                    f" form; use {default}, or keep the prepared model"
                )


CODES_ONLY: dict[str, Any] = {
    "w_quantizer": "symmetric",
    "a_quantizer": "symmetric",
    "kv_quantizer": "symmetric",
    "numerics": "spec",
    "a_group_size": -1,
}
"""The fields that a packed or fused model fixes, and their only values there."""
LATER_FIELDS = (*CODES_ONLY, "a_group_axis")
"""What checkpoints of the first version did not have."""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_bits(name: str, value: object) -> None:
    if not _is_int(value) or (value not in QUANTIZED_BITS and value not in OFF_BITS):
        raise ConfigError(
            f"{name}: {_short(value)} is not supported; use 2..8, or 16 or 32 for off"
        )


def _check_group_size(name: str, value: object, smallest: int = 2) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (value != -1 and not smallest <= value <= 2**20)
    ):
        raise ConfigError(
            f"{name}: {_short(value)} is not supported; use -1 for whole rows, or a divisor >="
            f" {smallest} of them"
        )


def _check_combination(config: QATConfig) -> None:
    """ConfigError for choices that contradict each other or would do nothing."""
    official = config.numerics == "official"
    if official and config.w_bits == OFFICIAL_STATSQ_BITS and config.w_quantizer != "symmetric":
        raise ConfigError(
            f"w_quantizer: numerics 'official' takes StatsQ for weights of {OFFICIAL_STATSQ_BITS}"
            f" bits, not {config.w_quantizer}; leave it out, or use numerics 'spec'"
        )
    for kind in ("w", "a", "kv"):
        name, bits = f"{kind}_quantizer", getattr(config, f"{kind}_bits")
        quantizer = getattr(config, name)
        if official and quantizer in ("statsq", "lsq"):
            raise ConfigError(
                f"{name}: {quantizer} is no part of numerics 'official'; use symmetric or"
                " asymmetric, or numerics 'spec'"
            )
        if quantizer != "symmetric" and bits in OFF_BITS and not (official and bits == 16):
            raise ConfigError(
                f"{name}: {quantizer} has nothing to quantize at {kind}_bits {bits}; use 2..8 bits"
                " or leave it out"
            )
    if official and config.group_size != -1:
        raise ConfigError(
            f"group_size: {config.group_size} is no part of numerics 'official'; use -1, or"
            " numerics 'spec'"
        )
    if config.weight_scale_dtype == "integer":
        _check_integer_scales(config)
    if config.a_group_size == -1:
        if config.a_group_axis != A_GROUP_AXES[0]:
            raise ConfigError(
                f"a_group_axis: {config.a_group_axis} needs groups; set a_group_size, or leave it"
                " out"
            )
        return
    for name, wanted in (("a_quantizer", "symmetric"), ("numerics", "spec")):
        if getattr(config, name) != wanted:
            raise ConfigError(
                f"a_group_size: groups need {name} {wanted!r}, got {getattr(config, name)!r}; use"
                " -1"
            )
    if config.a_bits in OFF_BITS:
        raise ConfigError(
            f"a_group_size: {config.a_group_size} has nothing to quantize at a_bits"
            f" {config.a_bits}; use 2..8 bits or leave it out"
        )


def _check_integer_scales(config: QATConfig) -> None:
    """ConfigError unless every linear is a product of codes in groups of its columns (spec 18)."""
    narrow = range(QUANTIZED_BITS.start, INTEGER_SCALE_BITS + 1)
    needs: tuple[tuple[str, bool, str], ...] = (
        ("group_size", config.group_size != -1, "groups"),
        ("w_bits", config.w_bits in narrow, f"2..{INTEGER_SCALE_BITS} bits"),
        ("a_bits", config.a_bits in QUANTIZED_BITS, "2..8 bits"),
        *((name, getattr(config, name) == CODES_ONLY[name], str(CODES_ONLY[name]))
          for name in ("w_quantizer", "a_quantizer", "numerics", "a_group_size")),
    )  # fmt: skip
    for name, holds, wanted in needs:
        if not holds:
            raise ConfigError(
                f"{name}: {_short(getattr(config, name))} has no integer scales, which need"
                f" {wanted}; change it, or use weight_scale_dtype 'bfloat16'"
            )


def _check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise ConfigError(f"{name}: {_short(value)} is not supported; use {' or '.join(accepted)}")


def _check_ste_clip(value: object) -> None:
    if value is None:
        return
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ConfigError(
            f"ste_clip: {_short(value)} is not a positive number; use None to pass every gradient"
        )
