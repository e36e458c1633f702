"""One cell of a sweep: candidates that do the same work, gated, then timed in turns, as rows.

Each candidate gets copies of its own inputs, together more than four times the L2 cache, because a
4-bit weight that fits the cache would look faster than memory. One that fails its gate or cannot
run here becomes a row that says why; rows are written after every cell, so that a run that is
killed loses one cell at most.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda, records
from benchmarks.entry import Call, Cost, reason_of
from benchmarks.roofline import Roofline, repeated, repetitions
from benchmarks.timing import (
    RESULTS,
    Timer,
    cuda_seconds,
    interleaved,
    summary,
    wall_seconds,
    warn_without_commit,
)
from llmqat_kernels import use_backend
from llmqat_kernels.errors import InvalidArgument

COLUMNS = (
    *records.WHERE,
    *("triton", "cuda", "driver", "part", "cell", "candidate", "role"),
    *("p50_us", "p20_us", "p80_us", "bytes", "ops", "gb_per_s", "gop_per_s"),
    *("percent_of_copy", "percent_of_peak", "ratio", "timing", "copies", "gate"),
    *("copy_gb_per_s", "peak_gop_per_s"),
)
"""``cell``: ``name=value`` pairs. ``role``: ``ours`` or ``baseline``. ``ratio``: the time of the
fastest baseline of the cell over this one's, the median of the rounds; above 1 this one is faster.
"""
OURS, BASELINE = "ours", "baseline"
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
"""The backends side by side; on a CPU its own stand in, so that everything but the device runs."""
ROUNDS = 3
Row = records.Row
Gate = Callable[[Call], None]


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context: nothing runs in this process any more."""


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a cell.

    Args:
        make: the call on each of so many copies of its inputs. It may raise: then that is the
            reason why the candidate is left out.
        cost: least traffic and arithmetic of one call.
        role: ``ours`` or ``baseline``. gate: raises AssertionError for a wrong result.
    """

    make: Callable[[int], Sequence[Call]]
    cost: Cost
    role: str = OURS
    gate: Gate | None = None

    @property
    def ops(self) -> int:
        """Operations of one call, floating-point and integer."""
        return self.cost.flops + self.cost.int_ops


class Pool:
    """Copies of the same tensors, made once and shared by the cells of a sweep."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, list[Any]()
        self._error: Exception | None = None

    def take(self, count: int) -> list[Any]:
        """``count`` copies; an error of the first one is raised again for the later ones."""
        if self._error is not None:
            raise self._error
        try:
            while len(self._made) < count:
                self._made.append(self._make())
        except Exception as error:
            self._error = error
            raise
        return self._made[:count]


@dataclass(frozen=True)
class Cell:
    """Seconds of one call by candidate and round, how each was timed, and why others were not."""

    seconds: Mapping[str, list[float]]
    timing: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def with_backend(name: str, call: Call) -> Call:
    """``call`` on a backend, whatever is in force elsewhere."""

    def run_it() -> Any:
        with use_backend(name):
            return call()

    return run_it


def without_gradient(call: Call) -> Call:
    """``call`` in inference mode."""

    def run_it() -> Any:
        with torch.inference_mode():
            return call()

    return run_it


def copies_on(device: torch.device, traffic: int) -> int:
    """Copies of the inputs of a call; one on a CPU, where nothing is claimed."""
    return cuda.copies_for(traffic, cuda.l2_bytes(device)) if device.type == "cuda" else 1


def prepare(
    candidates: Mapping[str, Candidate], device: torch.device
) -> tuple[dict[str, Sequence[Call]], dict[str, str]]:
    """The calls of every candidate that passes its gate, and what is said of the others.

    Raises:
        DeviceLost: the device does not answer after one of them.
    """
    ready: dict[str, Sequence[Call]] = {}
    notes: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            calls = list(candidate.make(copies_on(device, candidate.cost.bytes)))
            calls[0]() if candidate.gate is None else candidate.gate(calls[0])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except AssertionError as error:
            notes[name] = f"failed: {error}".replace("\n", " ")
        except Exception as error:  # kernels and packages of any kind: the reason is the finding
            notes[name] = f"left out: {reason_of(error)}"
            check_alive(device, name, notes[name])
        else:
            ready[name] = calls
    return ready, notes


def check_alive(device: torch.device, name: str, note: str, advice: str = "") -> None:
    """Raise DeviceLost where the device does not answer any more; ``advice``: what to do then."""
    if not cuda.responds(device):
        advice = advice or f"run again with --skip {name.split()[0]}"
        raise DeviceLost(f"{name}: {note}; {advice}")


def measure(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    rounds: int = ROUNDS,
    seconds: float = 1e-3,
) -> Cell:
    """Gate every candidate, then time those that pass in turns; ``seconds`` a sample on a CPU."""
    ready, notes = prepare(candidates, device)
    if not ready:
        return Cell({}, notes=notes)
    copies = {name: len(calls) for name, calls in ready.items()}
    if device.type == "cuda":
        measured, how = cuda.times(ready, rounds)
        return Cell(measured, how, copies, notes)
    calls = {name: found[0] for name, found in ready.items()}
    counts = {name: repetitions(call, wall_seconds, seconds) for name, call in calls.items()}
    loops = {name: repeated(call, counts[name]) for name, call in calls.items()}
    times = interleaved(loops, rounds)
    scaled = {name: [t / counts[name] for t in values] for name, values in times.items()}
    return Cell(scaled, dict.fromkeys(calls, "wall"), copies, notes)


def rows_of(
    part: str, cell: Mapping[str, Any], candidates: Mapping[str, Candidate], measured: Cell,
    roofline: Roofline,
) -> list[Row]:  # fmt: skip
    """The rows of one cell, in the order of its candidates."""
    label = " ".join(f"{key}={value}" for key, value in cell.items())
    middle = {name: summary(values)["p50"] for name, values in measured.seconds.items()}
    others = [name for name in middle if candidates[name].role == BASELINE]
    best = min(others, key=middle.__getitem__, default=None)
    rows = []
    for name, candidate in candidates.items():
        row: Row = {"part": part, "cell": label, "candidate": name, "role": candidate.role}
        if name in measured.notes:
            rows.append(row | {"gate": measured.notes[name]})
            continue
        values, cost = measured.seconds[name], candidate.cost
        figure = summary(values)
        row |= {f"{key}_us": f"{1e6 * value:.3f}" for key, value in figure.items()}
        copy = roofline.bandwidth_at(cost.bytes)
        peak = roofline.int8 if cost.int_ops else max(roofline.bf16, roofline.fp32)
        row |= {
            "bytes": cost.bytes,
            "ops": candidate.ops,
            "gb_per_s": f"{cost.bytes / figure['p50'] / 1e9:.2f}",
            "gop_per_s": f"{candidate.ops / figure['p50'] / 1e9:.2f}",
            "percent_of_copy": f"{100 * cost.bytes / figure['p50'] / copy:.1f}",
            "percent_of_peak": f"{100 * candidate.ops / figure['p50'] / peak:.1f}",
            "timing": measured.timing.get(name, ""),
            "copies": measured.copies.get(name, 1),
            "gate": "" if candidate.gate is None else "passed",
            "copy_gb_per_s": f"{copy / 1e9:.1f}",
            "peak_gop_per_s": f"{peak / 1e9:.1f}",
        }
        if best is not None and name != best:
            pairs = zip(measured.seconds[best], values, strict=True)
            row["ratio"] = f"{summary([other / own for other, own in pairs])['p50']:.3f}"
        rows.append(row)
    return rows


def parse_cell(label: str) -> dict[str, str]:
    """``{"layer": "qkv", "M": "1"}`` of ``layer=qkv M=1``."""
    return dict(part.split("=", 1) for part in label.split())


class Recorder:
    """Prints rows and, with ``save``, appends those of every cell at once to
    ``results/<part>_<device>.csv``.
    """

    def __init__(self, part: str, device: torch.device, save: bool, results: Path) -> None:
        self.part = part
        self.path = results / f"{part}_{device.type}.csv"
        self._save = save
        self._here = records.where("events" if device.type == "cuda" else "wall", device)
        if save:
            warn_without_commit(device.type)
        self.failed = 0
        self.cells = 0

    def add(self, rows: Sequence[Row]) -> None:
        """One cell."""
        self.cells += 1
        self.failed += sum(str(row.get("gate", "")).startswith("failed") for row in rows)
        print(text_of(rows), flush=True)
        if self._save:
            records.append(self.path, [self._here | row for row in rows], COLUMNS)

    def close(self) -> int:
        """What was done, in a line; the exit status."""
        where = f", appended to {self.path}" if self._save else ""
        print(f"\n{self.part}: {self.cells} cells, {self.failed} failed gates{where}")
        return int(self.failed > 0)


def text_of(rows: Sequence[Row]) -> str:
    """The rows of a cell for a terminal."""
    lines = [rows[0]["cell"]]
    for row in rows:
        if "p50_us" not in row:
            lines.append(f"  {row['candidate']}: {row['gate']}")
            continue
        ratio = f", best baseline {row['ratio']}x" if row.get("ratio") else ""
        lines.append(
            f"  {row['candidate']}: {float(row['p50_us']):.2f} us"
            f" ({float(row['p20_us']):.2f}-{float(row['p80_us']):.2f}), {row['gb_per_s']} GB/s"
            f" ({row['percent_of_copy']} % of copy), {row['gop_per_s']} GOP/s{ratio}"
        )
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every sweep has."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="the first cells only; on a CPU tiny")
    parser.add_argument("--save", action="store_true", help="append rows to the results")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--skip", nargs="+", default=[], help="leave out candidates whose name has one of these"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")


def wanted(candidates: Mapping[str, Candidate], skip: Sequence[str]) -> dict[str, Candidate]:
    """The candidates that no word of ``skip`` names."""
    return {n: c for n, c in candidates.items() if not any(word in n.split() for word in skip)}


def within(budget: float, items: Sequence[Any], name: str) -> Iterator[Any]:
    """The items until the budget is spent; says how many were left."""
    begin = time.monotonic()
    for index, item in enumerate(items):
        if time.monotonic() - begin > budget:
            print(f"\n--budget: {len(items) - index} {name} left out")
            return
        yield item


def timer_of(device: torch.device) -> Timer:
    """Events on a GPU, the wall clock elsewhere."""
    return cuda_seconds if device.type == "cuda" else wall_seconds


def guarded(main: Callable[[], int]) -> int:
    """``main``, with a lost device as one line and status 1."""
    try:
        return main()
    except DeviceLost as error:
        sys.stderr.write(f"the device is lost: {error}\n")
        return 1


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InvalidArgument for numbers out of range."""
    if min(args.rounds, args.threads) < 1:
        raise InvalidArgument("--rounds and --threads must be at least 1")
