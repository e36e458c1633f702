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
SCALE_DTYPES = ("bfloat16", "float32")
PACKED_KV_BITS = (4, 8, *OFF_BITS)
"""KV widths that a cache can store; the other widths exist as fake quantization only."""

PAPER_SETTINGS = (
    "16-16-16",
    "8-8-4",
    "8-8-8",
    "8-8-16",
    "4-8-4",
    "4-8-8",
    "4-8-16",
    "4-6-16",
    "4-16-16",
    "8-16-16",
)
"""The W-A-KV settings of the paper's main tables (LLM-QAT tables 1 and 2)."""


@dataclass(frozen=True)
class QuantSpec:
    """How one kind of tensor is quantized (spec 1-5): bits, rows or groups of rows, rounding of the
    scale.
    """

    bits: int
    group_size: int = -1
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)
        _check_group_size("group_size", self.group_size)
        _check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    @property
    def enabled(self) -> bool:
        """False for 16 and 32 bits."""
        return self.bits not in OFF_BITS

    @property
    def qmax(self) -> int:
        """The largest code, ``2^(bits-1) - 1`` (spec 1); defined for enabled specs only."""
        if not self.enabled:
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
            or ``float32``.
        ste_clip: gradients are zero where |x| >= ste_clip; None passes all (spec 6).

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

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "kv_bits"):
            _check_bits(name, getattr(self, name))
        _check_choice("kv_mode", self.kv_mode, KV_MODES)
        _check_group_size("group_size", self.group_size)
        _check_choice("weight_scale_dtype", self.weight_scale_dtype, SCALE_DTYPES)
        _check_ste_clip(self.ste_clip)

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

    @property
    def setting(self) -> str:
        """``"4-8-4"``: bits of weights, activations, KV cache."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def weight(self) -> QuantSpec:
        """The weights of the linears."""
        return QuantSpec(self.w_bits, self.group_size, self.weight_scale_dtype)

    @property
    def activation(self) -> QuantSpec:
        """The inputs of the linears."""
        return QuantSpec(self.a_bits)

    @property
    def kv(self) -> QuantSpec:
        """Keys and values."""
        return QuantSpec(self.kv_bits)

    @property
    def quantizes_linears(self) -> bool:
        """Whether any linear is changed by weight or activation quantization."""
        return self.weight.enabled or self.activation.enabled

    def check_packable(self) -> None:
        """Raise ConfigError unless a converted model can hold this setting."""
        if not self.weight.enabled:
            raise ConfigError(
                f"w_bits: {self.w_bits} leaves nothing to pack; convert needs 2..8, keep the"
                " prepared model"
            )
        if self.kv_bits not in PACKED_KV_BITS:
            raise ConfigError(
                f"kv_bits: {self.kv_bits} has no packed KV cache; convert accepts 4, 8, 16 or 32"
            )


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


def _check_group_size(name: str, value: object) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (value != -1 and not 2 <= value <= 2**20)
    ):
        raise ConfigError(
            f"{name}: {_short(value)} is not supported; use -1 for whole rows, or a divisor >= 2 of"
            " them"
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
