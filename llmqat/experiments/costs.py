"""Sizes, operations and Figure 4's arithmetic for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.eval.cost import GIB, ModelShape, kv_bytes_per_token, ops, weight_bytes

SEQ_LEN = 2048
"""Tokens of OPs (section 3.1) and of the KV cache that is counted."""
FULL = "16-16-16"
MEASURED = ("8-8-8", "4-8-8")
"""Settings of Figure 4's other lines."""


def shape_of(folder: Path) -> dict[str, Any] | None:
    """The sizes of a model folder; None where costs are not defined for its family."""
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    try:
        return asdict(ModelShape.from_config(config))
    except ConfigError:
        return None


def row_cost(shape: Mapping[str, Any], bits: str, kv_mode: str | None) -> dict[str, float]:
    """Weights and KV cache of :data:`SEQ_LEN` tokens in GiB, and OPs, of one row."""
    model = ModelShape(**shape)
    config = QATConfig.parse(bits, kv_mode=kv_mode or "paper")
    weights = weight_bytes(model, config).total / GIB
    cache = kv_bytes_per_token(model, config).total * SEQ_LEN / GIB
    return {
        "weights_gib": weights,
        "kv_gib": cache,
        "total_gib": weights + cache,
        "ops": float(ops(model, config, SEQ_LEN)),
    }


@dataclass(frozen=True)
class CostLine:
    """Total cost over inferences, ``fixed + days_per_inference * n``, in A100 days.

    Attributes:
        source: where the speed comes from.
        published: the paper's days at its number of inferences.
    """

    label: str
    setting: str
    fixed: float
    days_per_inference: float
    source: str
    published: float | None = None

    def days(self, inferences: float) -> float:
        """The cost of so many inferences."""
        return self.fixed + self.days_per_inference * inferences


def cost_lines(
    assumptions: Mapping[str, float], speeds: Mapping[str, float] | None = None
) -> list[CostLine]:
    """The lines of Figure 4: full precision, post-training 8-8-8, LLM-QAT 4-8-8.

    Args:
        assumptions: of the table (section 3.4 of the paper).
        speeds: measured tokens per second by setting; 16-16-16 with 8-8-8, 4-8-8 or both adds a
            line for each beside the paper's speedup.

    Raises:
        ConfigError: a speed that is no positive number, of a setting without a line, or without
            one of 16-16-16 to compare with.
    """
    a, speeds = assumptions, dict(speeds or {})
    _check_speeds(speeds)
    unit = a["inference_days"] / a["inferences"]
    lines = [CostLine("full precision", FULL, 0.0, unit, "the paper", a["inference_days"])]
    for label, setting, fixed in (
        ("post-training", MEASURED[0], a["ptq_days"]),
        ("LLM-QAT", MEASURED[1], a["generation_days"] + a["training_days"]),
    ):
        key = setting.replace("-", "_")
        speedup, source = a[f"speedup_{key}"], f"{a[f'speedup_{key}']}x, assumed by the paper"
        published = a[f"published_days_{key}"]
        lines.append(CostLine(label, setting, fixed, unit / speedup, source, published))
        if setting in speeds:
            measured = speeds[setting] / speeds[FULL]
            text = f"{measured:.2f}x, measured"
            lines.append(CostLine(f"{label}, measured", setting, fixed, unit / measured, text))
    return lines


def _check_speeds(speeds: Mapping[str, float]) -> None:
    for setting, speed in speeds.items():
        if setting not in (FULL, *MEASURED):
            accepted = ", ".join((FULL, *MEASURED))
            raise ConfigError(f"--speed: figure 4 has no line of {setting!r}; use {accepted}")
        if not (math.isfinite(speed) and speed > 0):
            raise ConfigError(f"--speed: {setting}={speed} is not a positive number")
    if speeds and FULL not in speeds:
        raise ConfigError(f"--speed: {FULL} is missing, which the others are compared with")
    if speeds and not any(setting in speeds for setting in MEASURED):
        raise ConfigError(f"--speed: {FULL} alone compares nothing; add {' or '.join(MEASURED)}")


def break_even(line: CostLine, other: CostLine) -> float | None:
    """Inferences from which ``line`` is cheaper than ``other``; None if it never is."""
    gain = other.days_per_inference - line.days_per_inference
    if gain <= 0:
        return None
    return max(0.0, (line.fixed - other.fixed) / gain)
