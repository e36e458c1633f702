"""Everything there is to measure on a GPU, the most important first: what `make bench-gpu` runs.

    python -m benchmarks.gpu [--seconds 570] [--parts gemm decode_7b ...] [--device cuda]

Each part is a process of its own with a budget: it starts no cell after that and has written what
it measured by then, and one that hangs or breaks the device is ended without harm to the next. The
parts that most figures of README's tables come from are first, and get the time that their rows
take. What did not fit is named. At the end the report is written from the files in
benchmarks/results: benchmarks/results/report_cuda.md, and the tables of README.md and
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.timing import require_device

SECONDS = 570
"""A little less than ten minutes: a start and an end have to fit beside it."""
GRACE = 20
"""Seconds that a part may take beyond its budget: to load torch, and to finish its last cell."""
LEAST = 15
"""A part with less time than this is not started."""
REPORT_SECONDS = 30


@dataclass(frozen=True)
class Part:
    """A part's name, its share of the time, its arguments after the device, and its module of
    benchmarks where that has another name.
    """

    name: str
    share: float
    what: str
    arguments: tuple[str, ...] = ("--save",)
    budget: str = "--budget"
    module: str = ""

    def command(self, device: str, seconds: float) -> list[str]:
        """The process."""
        module = f"benchmarks.{self.module or self.name}"
        return [sys.executable, "-m", module, *self.argv(device, seconds)]

    def argv(self, device: str, seconds: float) -> list[str]:
        """What it is called with."""
        return ["--device", device, *self.arguments, self.budget, f"{seconds:.0f}"]


PARTS = (
    Part("gemm", 0.16, "products of a layer against cuBLAS, tinygemm, humming, gemlite"),
    Part("decode_7b", 0.18, "7B decode and prefill in the engine, on both backends"),
    Part("attention", 0.09, "decode attention on the quantized KV cache"),
    *(
        Part(
            f"equality_{backend}", 0.05, f"{backend} kernels against the specification",
            ("--backend", backend, "--save"), "--seconds", "equality",
        )
        for backend in ("cuda", "triton")
    ),
    Part("run", 0.25, "every operator of the registry", ()),
    Part("qat_slice", 0.15, "a training step"),
    Part("generate_data", 0.07, "data generation against batch-1 transformers"),
)  # fmt: skip


def run_process(command: Sequence[str], timeout: float) -> int | None:
    """The exit status of a process; None if it had to be ended."""
    process = subprocess.Popen(command)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def run_parts(
    parts: Sequence[Part],
    device: str,
    seconds: float,
    start: Callable[[Sequence[str], float], int | None] = run_process,
) -> dict[str, str]:
    """Run the parts within ``seconds`` in all; what came of each.

    A part's budget is its share of the whole; time that one leaves goes to those after it.
    """
    begin = time.monotonic()
    outcome: dict[str, str] = {}
    left = sum(part.share for part in parts)
    for part in parts:
        remaining = seconds - (time.monotonic() - begin)
        budget = remaining * part.share / left - GRACE / 2
        left -= part.share
        if budget < LEAST / 2 or remaining < LEAST:
            outcome[part.name] = "left out: no time left"
            continue
        print(f"\n=== {part.name}: {part.what} ({budget:.0f} s) ===", flush=True)
        status = start(part.command(device, budget), min(budget + GRACE, remaining))
        outcome[part.name] = (
            "ended by the clock; what it had written stays"
            if status is None
            else "done"
            if status == 0
            else f"exit status {status}"
        )
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run, report, sum up; 0 if every part that ran was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(part.name for part in PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--no-report", action="store_true", help="leave the pages as they are")
    args = parser.parse_args(argv)
    require_device(args.device)
    chosen = [part for part in PARTS if part.name in args.parts]
    outcome = run_parts(chosen, args.device, args.seconds - REPORT_SECONDS)
    if not args.no_report:
        status = run_process([sys.executable, "-m", "benchmarks.report"], REPORT_SECONDS)
        outcome["report"] = "done" if status == 0 else f"exit status {status}"
    print("\n" + "\n".join(f"{name}: {text}" for name, text in outcome.items()))
    return int(any(text.startswith("exit status") for text in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
