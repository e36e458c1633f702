"""The result of :mod:`llmqat.bench.kv` for people: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.eval.cost import GIB

__all__ = ["plot", "table"]

_COLORS = {16: "#555555", 8: "#4488aa", 4: "#cc6666"}


def table(result: dict[str, Any]) -> str:
    """A Markdown table, one line per length, a group of columns per width."""
    widths = list(dict.fromkeys(row["bits"] for row in result["rows"]))
    lengths = list(dict.fromkeys(row["seq_len"] for row in result["rows"]))
    cells = {(row["bits"], row["seq_len"]): row for row in result["rows"]}
    heads = [f"KV{bits} GiB computed | measured | tokens/s" for bits in widths]
    lines = [
        "| tokens | " + " | ".join(heads) + " |",
        "|---:|" + "---:|" * (3 * len(widths)),
    ]
    for length in lengths:
        parts = [_length(length)]
        for bits in widths:
            row = cells[bits, length]
            parts += [_gib(row["computed_bytes"]), _gib(row["measured_bytes"])]
            speed = row["tokens_per_second"]
            parts.append("-" if speed is None else f"{speed:.1f}")
        lines.append("| " + " | ".join(parts) + " |")
    notes = dict.fromkeys(row["note"] for row in result["rows"] if row["note"])
    return "\n".join([*lines, *(("", *(f"- {note}" for note in notes)) if notes else ())]) + "\n"


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / GIB:.3g}"


def plot(result: dict[str, Any], path: Path) -> None:
    """`path`, a PNG: memory (line computed, dots measured) and decode speed over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, speed) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for bits in dict.fromkeys(row["bits"] for row in result["rows"]):
        rows = sorted(
            (row for row in result["rows"] if row["bits"] == bits), key=lambda row: row["seq_len"]
        )
        color, lengths = _COLORS[bits], [row["seq_len"] for row in rows]
        label = f"{bits} bits"
        memory.plot(
            lengths, [row["computed_bytes"] / GIB for row in rows], color=color, label=label
        )
        timed = [row for row in rows if row["measured_bytes"] is not None]
        lengths = [row["seq_len"] for row in timed]
        memory.plot(lengths, [row["measured_bytes"] / GIB for row in timed], "o", color=color)
        speeds = [row["tokens_per_second"] for row in timed]
        speed.plot(lengths, speeds, "o-", color=color, label=label)
    memory.set_ylabel("KV cache, GiB (dots: measured)")
    speed.set_ylabel("decode, tokens per second")
    memory.set_yscale("log")
    fastest = max((row["tokens_per_second"] or 0.0 for row in result["rows"]), default=0.0)
    speed.set_ylim(0, 1.1 * fastest or None)
    lengths = sorted({row["seq_len"] for row in result["rows"]})
    for axes in (memory, speed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_length(length) for length in lengths])
        axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
        axes.set_xlabel("tokens per sequence")
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    with io.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    plt.close(figure)
