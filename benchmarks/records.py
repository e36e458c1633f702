"""Rows of the results files: their columns, the files, and their lines in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import optional
from benchmarks.registry import Case
from benchmarks.timing import environment
from llmqat.io import make_dir, write_text
from llmqat_kernels.errors import InvalidArgument

OURS = "llmqat"
WHERE = ("time", "commit", "processor", "isa", "threads", "python", "torch", "clock")
COLUMNS = (
    *WHERE,
    *("op", "variant", "shape", "dtype", "backend", "candidate", "p50_us", "p20_us", "p80_us"),
    *("bytes", "flops", "int_ops", "gb_per_s", "gop_per_s", "bound", "percent_of_bound"),
    *("ratio", "gate", "triton", "cuda", "driver", "timing", "copies", "peak_bytes"),
)
"""``ratio``: a baseline's time over ours, the median of the rounds; above 1 we are faster. The last
three on a GPU: ``graph`` or ``events``, copies of the inputs, memory of one call."""
KEY = ("op", "variant", "shape", "dtype")
"""The columns that name a case."""
Row = dict[str, Any]


def head(case: Case, backend: str, candidate: str) -> Row:
    """The columns of a row that say what it is of."""
    return {
        "op": case.entry.op,
        "variant": case.entry.variant,
        "shape": case.shape.label,
        "dtype": case.dtype_name,
        "backend": backend if candidate == OURS else "",
        "candidate": candidate,
    }


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What names the case of a row."""
    return tuple(row[column] for column in KEY)


def table_head() -> str:
    """Head of the table on the terminal and in docs/benchmarks.md."""
    names = ("op", "shape", "dtype", "backend", "p50 (p20-p80)", "GB/s", "GOP/s", "% of bound")
    return f"| {' | '.join([*names, 'times a baseline takes'])} |\n|{'---|' * 9}"


def table_line(rows: Sequence[Row]) -> str:
    """One case as a line of markdown; ``rows``: the op's, then its baselines'."""
    ours, *baselines = rows
    name = f"{ours['op']} {ours['variant']}".strip()
    cells = [name, ours["shape"], ours["dtype"], ours["backend"]]
    if ours["gate"] != "passed":
        gate = ours["gate"].replace("|", "/")  # a bar in a message would be a column
        return f"| {' | '.join(cells)} | gate {gate}; not timed | | | | |"
    p50, p20, p80 = (float(ours[f"{key}_us"]) for key in ("p50", "p20", "p80"))
    ratios = ", ".join(
        f"{row['candidate']} {float(row['ratio']):.2f}x" for row in baselines if row.get("ratio")
    )
    cells += [
        f"{_micro(p50)} ({_micro(p20)}-{_micro(p80)}) us",
        ours["gb_per_s"],
        ours["gop_per_s"],
        f"{float(ours['percent_of_bound']):.0f} {ours['bound']}",
        ratios,
    ]
    return f"| {' | '.join(cells)} |"


def _micro(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def append(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a results file, which is replaced as a whole; columns that it lacks stay empty in
    its older rows.

    Raises:
        InvalidArgument: the file has columns that are none of ours.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    if path.exists():
        with path.open(newline="") as file:
            before = csv.DictReader(file)
            if not set(before.fieldnames or ()) <= set(columns):
                raise InvalidArgument(
                    f"results: {path} has other columns; move it away and run again"
                )
            writer.writerows(before)
    writer.writerows(rows)
    make_dir(path.parent)
    write_text(path, text.getvalue())


def where(clock: str, device: torch.device) -> Row:
    """The columns that say where and when a row was measured."""
    found = environment(device)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    known = {key: value for key, value in found.items() if key in COLUMNS and value is not None}
    return {"time": now, "clock": clock, **known}


class Record:
    """The rows of a run, appended to a file as they come (None: kept here only)."""

    def __init__(self, path: Path | None, here: Row) -> None:
        self._path, self._here = path, here
        self.rows: list[Row] = []

    def store(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with where they were measured, on disk."""
        found = [self._here | row for row in rows]
        if self._path is not None:
            append(self._path, found)
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """One case: its line on the terminal, its rows in the file."""
        print(table_line(rows), flush=True)
        self.rows += self.store(rows)

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return sum(str(row.get("gate", "")).startswith("failed") for row in self.rows)

    def close(self, device: torch.device) -> int:
        """What was done, and what is missing in which row; the exit status."""
        if device.type == "cuda":
            packages = ", ".join(f"{name} {found}" for name, found in optional.versions().items())
            print(f"\nOther packages: {packages}.")
            reasons = {f"{r['candidate']}: {r['gate']}" for r in self.rows if _left_out(r)}
            print("\n".join(sorted(reasons)))
        slow = sorted({row["op"] for row in self.rows if row["backend"] == "reference"})
        if slow:
            print(f"\nOn the reference backend (no {device.type} kernel): {', '.join(slow)}.")
        if self._path is not None:
            print(f"\n{len(self.rows)} rows appended to {self._path}, {self.failed} failed")
        return int(self.failed > 0)


def _left_out(row: Row) -> bool:
    return str(row.get("gate", "")).startswith("left out")


def commits_of(hashes: Iterable[str | None]) -> str:
    """``commits abc, def``, each once; a result of a copy that knew none is from an unknown one."""
    return "commits " + ", ".join(dict.fromkeys(commit or "unknown" for commit in hashes))
