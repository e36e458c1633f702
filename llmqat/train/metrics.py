"""The written record of a run: `metrics.jsonl`, one line per logged step, and its curve."""

from __future__ import annotations

import csv
import io as stdio
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from llmqat import io

__all__ = ["CURVE_COLUMNS", "MetricsLog", "TermMeans", "read_metrics", "write_curve"]

CURVE_COLUMNS = (
    "step",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "health/flipped",
    "seconds",
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, in order; a torn last line is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict) or "step" not in entry:
            break
        entries.append(entry)
    return entries


class MetricsLog:
    """Appends to a `metrics.jsonl`; every line is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> float:
        """Forget what was logged after `step`; returns the seconds trained until then."""
        entries = [entry for entry in read_metrics(self.path) if entry["step"] <= step]
        io.write_text(self.path, "".join(map(_line, entries)))
        return float(entries[-1].get("seconds", 0.0)) if entries else 0.0

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry (JSON values, with a "step")."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                io.write_all(fd, _line(entry).encode())
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise io.error_at(error, self.path) from error


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


class TermMeans:
    """Means of a loss's terms over the micro-batches (and processes) since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count one micro-batch: fp32 scalars by name, without gradient."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means as "loss/<term>", and begin anew; every process has to call it."""
        means = {
            f"loss/{name}": float(accelerator.gather(total.reshape(1)).mean()) / self._count
            for name, total in self._sums.items()
        }
        self._sums, self._count = {}, 0
        return means


def write_curve(entries: list[dict[str, Any]], path: Path) -> None:
    """The training curve as CSV with `CURVE_COLUMNS`; empty where a step did not log a value."""
    text = stdio.StringIO(newline="")
    writer = csv.DictWriter(text, CURVE_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    io.write_text(path, text.getvalue())
