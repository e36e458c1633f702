"""Sizes, operations and Figure 4's arithmetic for a report."""

from __future__ import annotations

import json
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
        speeds: measured tokens per second by setting; they replace the paper's speedups where both
            16-16-16 and the setting are given.

    Raises:
        ConfigError: a speed that is not positive.
    """
    a, speeds = assumptions, dict(speeds or {})
    for setting, speed in speeds.items():
        if not speed > 0:
            raise ConfigError(f"--speed: {setting}={speed} is not positive")
    unit = a["inference_days"] / a["inferences"]
    lines = [CostLine("full precision", "16-16-16", 0.0, unit, "the paper", a["inference_days"])]
    for label, setting, fixed in (
        ("post-training", "8-8-8", a["ptq_days"]),
        ("LLM-QAT", "4-8-8", a["generation_days"] + a["training_days"]),
    ):
        key = setting.replace("-", "_")
        speedup, source = a[f"speedup_{key}"], f"{a[f'speedup_{key}']}x, assumed by the paper"
        published = a[f"published_days_{key}"]
        lines.append(CostLine(label, setting, fixed, unit / speedup, source, published))
        if setting in speeds and "16-16-16" in speeds:
            measured = speeds[setting] / speeds["16-16-16"]
            text = f"{measured:.2f}x, measured"
            lines.append(CostLine(f"{label}, measured", setting, fixed, unit / measured, text))
    return lines


def break_even(line: CostLine, other: CostLine) -> float | None:
    """Inferences from which ``line`` is cheaper than ``other``; None if it never is."""
    gain = other.days_per_inference - line.days_per_inference
    if gain <= 0:
        return None
    return max(0.0, (line.fixed - other.fixed) / gain)
