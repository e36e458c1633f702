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
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import cuda, gpu_figures
from benchmarks.entry import Job, check_baselines, reason_of, with_optional
from benchmarks.records import OURS, Record, Row, head, key_of, table_head, where
from benchmarks.registry import Case, cases
from benchmarks.roofline import Roofline, describe, measure, repeated, repetitions
from benchmarks.timing import (
    RESULTS,
    Timer,
    cpu_seconds,
    cuda_seconds,
    interleaved,
    require_device,
    summary,
    wall_seconds,
    warn_without_commit,
)
from llmqat_kernels import dispatch
from llmqat_kernels.errors import InvalidArgument

CLOCKS: dict[str, Timer] = {"wall": wall_seconds, "cpu": cpu_seconds}


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
        row = head(case, backend, name) | {
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
        return [head(case, backend, OURS) | {"gate": f"failed: {reason}"}]
    if device.type == "cuda":
        job, missing = with_optional(job)
        measured = on_cuda(case, job, device, rounds)
    else:
        measured = Measured(times(job, timer, rounds, seconds))
    left_out = [
        head(case, backend, name) | {"gate": f"left out: {reason}"}
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
    return [head(case, backend, OURS) | {"gate": f"failed: {reason}"}]


def read_by_figures(chosen: Sequence[Case]) -> set[tuple[str, ...]]:
    """The keys of the cases that README's GPU table reads: what its readers ask for."""
    asked: set[tuple[str, ...]] = set()

    class Asked(gpu_figures.Results):
        def find(
            self, op: str, variant: str = "", least: tuple[str, int] | None = None
        ) -> list[gpu_figures.Group]:
            groups = super().find(op, variant, least)
            asked.update(key_of(group[0]) for group in groups)
            return groups

    # A reader needs no times of a row that failed.
    groups = [[head(case, "", OURS) | {"gate": "failed: not run"}] for case in chosen]
    for figure in gpu_figures.FIGURES:
        figure.read(Asked(groups, {}))
    return asked


def most_important_first(chosen: Sequence[Case], device_type: str) -> list[Case]:
    """The order under a budget: on a GPU what README's table reads, then the others; of both the
    first shape of every entry first.
    """
    read = read_by_figures(chosen) if device_type == "cuda" else set()

    def rank(case: Case) -> tuple[bool, int]:
        shapes = case.entry.grid(device_type).shapes
        return key_of(head(case, "", OURS)) not in read, shapes.index(case.shape)

    return sorted(chosen, key=rank)


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
        if not cuda.responds(device):
            left = len(chosen) - index - 1
            print(
                f"the device does not answer after {case.name}, {case.shape.label} (or one of its"
                f" baselines): {left} rows left out",
                file=sys.stderr,
            )
            return False
        torch.compiler.reset()  # compiled baselines of one row must not count as recompilations
        if rows[0]["gate"] != "passed":
            cuda.release(device)
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
    if not args.quick:
        warn_without_commit(args.device)
    record = Record(None if args.quick else args.results / f"{args.device}.csv", here)
    record.store(_roofline_rows(roofline))

    def start(case: Case) -> list[Row]:
        return attempt(case, device, timer, roofline, rounds, seconds)

    answers = run_cases(chosen, record, device, start, deadline)
    return record.close(device) or int(not answers)


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
