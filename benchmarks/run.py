"""Benchmark of every operator: gate, roofline, then time beside what a user would run instead.

    python -m benchmarks.run [--op NAME ...] [--device cpu|cuda] [--threads 1] [--quick] [--list]

A row is timed only after its outputs equal the reference backend's. The op and its baselines take
turns in one process, so a ratio holds when the machine's speed drifts; on a CUDA device as
benchmarks/cuda.py says. Rows are appended to benchmarks/results/<device>.csv after every case (not
with --quick), so that a run that is ended keeps them; `python -m benchmarks.report` turns them into
docs/benchmarks.md. With --budget no row starts after that many seconds, those that README's GPU
table reads come first, and those left out are named. Whatever a case raises is the reason of its
failed row, and the next one follows. Exit status 1 if a row failed, or without the device.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import cuda, optional
from benchmarks.entry import Job, check_baselines, reason_of, with_optional
from benchmarks.registry import Case, cases
from benchmarks.roofline import Roofline, describe, measure, repeated, repetitions
from benchmarks.timing import (
    RESULTS,
    Timer,
    cpu_seconds,
    cuda_seconds,
    environment,
    interleaved,
    require_device,
    summary,
    wall_seconds,
)
from llmqat.io import make_dir, write_text
from llmqat_kernels import dispatch
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
CLOCKS: dict[str, Timer] = {"wall": wall_seconds, "cpu": cpu_seconds}
Row = dict[str, Any]


def times(job: Job, timer: Timer, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call of the op and of each baseline, by round, in turns."""
    calls = {OURS: job.call, **job.baselines}
    counts = {name: repetitions(call, timer, seconds) for name, call in calls.items()}
    loops = {name: repeated(call, counts[name]) for name, call in calls.items()}
    measured = interleaved(loops, rounds, timer=timer)
    return {name: [t / counts[name] for t in values] for name, values in measured.items()}


@dataclass(frozen=True)
class Measured:
    """Seconds of one call by candidate and round; on a GPU also how it was timed, the copies of
    the inputs and the memory of one call.
    """

    seconds: Mapping[str, list[float]]
    timing: Mapping[str, str] = field(default_factory=dict)
    copies: int | None = None
    peak: Mapping[str, int] = field(default_factory=dict)


def on_cuda(case: Case, job: Job, device: torch.device, rounds: int) -> Measured:
    """Cold inputs and graph replay: benchmarks/cuda.py."""
    peak = {name: cuda.peak_bytes(call) for name, call in _calls(job).items()}
    count = cuda.copies_for(case.cost.bytes, cuda.l2_bytes(device))
    jobs = [_calls(job)]
    for _ in range(count - 1):
        copy, _ = with_optional(_only(case.build(device), job))
        jobs.append(_calls(copy))
    # A maker that works once and not twice is not worth a row of its own.
    names = [name for name in jobs[0] if all(name in calls for calls in jobs)]
    seconds, timing = cuda.times({n: [calls[n] for calls in jobs] for n in names}, rounds)
    return Measured(seconds, timing, count, peak)


def _calls(job: Job) -> dict[str, Any]:
    return {OURS: job.call, **job.baselines}


def _only(job: Job, like: Job) -> Job:
    """The optional baselines that worked in ``like``, and no others."""
    wanted = {name: make for name, make in job.optional.items() if name in like.baselines}
    return replace(job, optional=wanted)


def rows_of(case: Case, backend: str, measured: Measured, roofline: Roofline) -> list[Row]:
    """The op's row, then one for each baseline."""
    cost = case.cost
    floor, bound = roofline.bound(cost, case.dtype)
    rows: list[Row] = []
    for name, values in measured.seconds.items():
        figure = summary(values)
        row = _head(case, backend, name) | {
            f"{key}_us": f"{1e6 * value:.2f}" for key, value in figure.items()
        }
        if measured.copies is not None:
            row |= {
                "timing": measured.timing[name],
                "copies": measured.copies,
                "peak_bytes": measured.peak[name],
            }
        if name == OURS:
            row |= {
                "bytes": cost.bytes,
                "flops": cost.flops,
                "int_ops": cost.int_ops,
                "gb_per_s": f"{cost.bytes / figure['p50'] / 1e9:.2f}",
                "gop_per_s": f"{(cost.flops + cost.int_ops) / figure['p50'] / 1e9:.2f}",
                "bound": bound,
                "percent_of_bound": f"{100 * floor / figure['p50']:.1f}",
                "gate": "passed",
            }
        else:
            pairs = zip(values, measured.seconds[OURS], strict=True)
            row["ratio"] = f"{statistics.median(other / ours for other, ours in pairs):.3f}"
        rows.append(row)
    return rows


def _head(case: Case, backend: str, candidate: str) -> Row:
    return {
        "op": case.entry.op,
        "variant": case.entry.variant,
        "shape": case.shape.label,
        "dtype": case.dtype_name,
        "backend": backend if candidate == OURS else "",
        "candidate": candidate,
    }


def run_case(
    case: Case,
    device: torch.device,
    timer: Timer,
    roofline: Roofline,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Gate, then time; a failed gate gives one row that says why and has no time. An optional
    baseline that is left out gives a row with the reason.
    """
    backend = dispatch.resolve(case.entry.op, device.type, "auto").backend
    job = case.build(device)
    missing: dict[str, str] = {}
    try:
        job.gate()
        check_baselines(job)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        return [_head(case, backend, OURS) | {"gate": f"failed: {reason}"}]
    if device.type == "cuda":
        job, missing = with_optional(job)
        measured = on_cuda(case, job, device, rounds)
    else:
        measured = Measured(times(job, timer, rounds, seconds))
    left_out = [
        _head(case, backend, name) | {"gate": f"left out: {reason}"}
        for name, reason in missing.items()
    ]
    return rows_of(case, backend, measured, roofline) + left_out


def attempt(
    case: Case,
    device: torch.device,
    timer: Timer,
    roofline: Roofline,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """`run_case`; whatever it raises (memory, a kernel that does not compile) is the reason of a
    row without a time.
    """
    try:
        return run_case(case, device, timer, roofline, rounds, seconds)
    except Exception as error:  # kernels and packages of any kind: the other cases go on
        reason = reason_of(error)
    try:
        backend = dispatch.resolve(case.entry.op, device.type, "auto").backend
    except Exception:  # then this is what the case raised
        backend = ""
    return [_head(case, backend, OURS) | {"gate": f"failed: {reason}"}]


def responds(device: torch.device) -> bool:
    """Whether the device still answers; after a kernel broke its context nothing runs any more."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def release(device: torch.device) -> None:
    """Give memory back between shapes, and after a failure."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_by_figures(chosen: Sequence[Case]) -> set[tuple[str, ...]]:
    """The keys of the cases that README's GPU table reads: what its readers ask for."""
    from benchmarks import gpu_figures  # which imports this module

    asked: set[tuple[str, ...]] = set()

    class Asked(gpu_figures.Results):
        def find(
            self, op: str, variant: str = "", least: tuple[str, int] | None = None
        ) -> list[gpu_figures.Group]:
            groups = super().find(op, variant, least)
            asked.update(key_of(group[0]) for group in groups)
            return groups

    # A reader needs no times of a row that failed.
    groups = [[_head(case, "", OURS) | {"gate": "failed: not run"}] for case in chosen]
    for figure in gpu_figures.FIGURES:
        figure.read(Asked(groups, {}))
    return asked


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What names the case of a row."""
    return tuple(row[column] for column in KEY)


def most_important_first(chosen: Sequence[Case], device_type: str) -> list[Case]:
    """The order under a budget: on a GPU what README's table reads, then the others; of both the
    first shape of every entry first.
    """
    read = read_by_figures(chosen) if device_type == "cuda" else set()

    def rank(case: Case) -> tuple[bool, int]:
        shapes = case.entry.grid(device_type).shapes
        return key_of(_head(case, "", OURS)) not in read, shapes.index(case.shape)

    return sorted(chosen, key=rank)


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


def run_cases(
    chosen: Sequence[Case],
    record: Record,
    device: torch.device,
    start: Callable[[Case], list[Row]],
    deadline: float,
) -> bool:
    """Every case until the deadline (of time.monotonic); False if the device was lost."""
    for index, case in enumerate(chosen):
        if time.monotonic() > deadline:
            names = "; ".join(f"{case.name}, {case.shape.label}" for case in chosen[index:])
            print(f"\n--budget: {len(chosen) - index} rows left out: {names}.")
            return True
        rows = start(case)
        record.add(rows)
        if not responds(device):
            left = len(chosen) - index - 1
            print(
                f"the device does not answer after {case.name}, {case.shape.label} (or one of its"
                f" baselines): {left} rows left out",
                file=sys.stderr,
            )
            return False
        torch.compiler.reset()  # compiled baselines of one row must not count as recompilations
        if rows[0]["gate"] != "passed":
            release(device)
    return True


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", action="extend", help="these operators only")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=tuple(CLOCKS),
        help="cpu: processor seconds, for one thread on a machine that is not quiet",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape and dtype of each, 3 rounds, not recorded"
    )
    parser.add_argument("--budget", type=float, help="start no row after this many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of <device>.csv")
    parser.add_argument("--list", action="store_true", help="print the rows and their floors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, append the rows; the exit status."""
    parser = _arguments()
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu adds up the threads' seconds; use it with --threads 1 on cpu")
    try:
        chosen = list(cases(args.op, args.quick, args.device))
    except InvalidArgument as error:
        parser.error(str(error))
    if args.list:
        for case in chosen:
            cost = case.cost
            print(
                f"{case.name}, {case.shape.label}, {case.dtype_name}:"
                f" {cost.bytes:,} bytes, {cost.flops + cost.int_ops:,} operations"
            )
        return 0
    return measure_all(args, chosen, require_device(args.device))


def measure_all(args: argparse.Namespace, chosen: Sequence[Case], device: torch.device) -> int:
    """The roofline, then every case; the exit status."""
    deadline = math.inf
    if args.budget is not None:
        deadline = time.monotonic() + args.budget
        chosen = most_important_first(chosen, args.device)
    torch.set_num_threads(args.threads)
    timer = cuda_seconds if args.device == "cuda" else CLOCKS[args.clock]
    rounds, seconds = (3, 0.002) if args.quick else (args.rounds, 0.02)
    here = where("events" if args.device == "cuda" else args.clock, device)
    print(", ".join(f"{key} {value}" for key, value in here.items() if value))
    roofline = measure(device, timer, seconds)
    print(f"{describe(roofline)}\n\n{table_head()}", flush=True)
    record = Record(None if args.quick else args.results / f"{args.device}.csv", here)
    record.store(_roofline_rows(roofline))

    def start(case: Case) -> list[Row]:
        return attempt(case, device, timer, roofline, rounds, seconds)

    answers = run_cases(chosen, record, device, start, deadline)
    return record.close(device) or int(not answers)


def _left_out(row: Row) -> bool:
    return str(row.get("gate", "")).startswith("left out")


def _roofline_rows(roofline: Roofline) -> list[Row]:
    """The roofline as rows of the results file."""
    rows: list[Row] = [
        {"op": "roofline", "variant": "bandwidth", "bytes": f, "gb_per_s": f"{rate / 1e9:.2f}"}
        for f, rate in roofline.bandwidth.items()
    ]
    for name in ("fp32", "bf16", "int8"):
        peak = getattr(roofline, name) / 1e9
        rows.append(
            {"op": "roofline", "variant": "GEMM", "dtype": name, "gop_per_s": f"{peak:.1f}"}
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
