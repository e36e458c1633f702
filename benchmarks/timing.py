"""Interleaved timing: A B A B ..., so that a ratio holds when the machine's speed drifts."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

TREE = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"


Timer = Callable[[Callable[[], Any]], float]
"""Runs a function once and returns its seconds."""


def wall_seconds(function: Callable[[], Any]) -> float:
    """Seconds of one run by the wall clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Processor seconds of one run, all threads added up: for one thread on a busy machine."""
    start = time.process_time()
    function()
    return time.process_time() - start


def cuda_seconds(function: Callable[[], Any]) -> float:
    """Seconds of one run on the current CUDA stream, by its events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    warmup: int = 1,
    timer: Timer = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after ``warmup`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warmup + rounds):
        for name, function in candidates.items():
            elapsed = timer(function)
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile (extremes where there are few values)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "p50": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where a figure comes from: processor (the GPU, for a CUDA device), versions, commit, date."""
    import transformers

    from llmqat_kernels import native

    gpu = device is not None and device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if gpu else _processor(),
        "isa": None if gpu or not native.is_available() else native.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
        **(_cuda_versions() if gpu else {}),
    }


def _commit() -> str | None:
    """The checkout's commit; outside one, or without git, what LLMQAT_COMMIT says, if anything."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    # A copy of the tree inside another checkout has not that one's commit.
    own = {**os.environ, "GIT_CEILING_DIRECTORIES": str(TREE.parent)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=TREE, env=own
        )
        found = done.stdout.strip()
    except OSError:
        found = ""
    return found or os.environ.get("LLMQAT_COMMIT", "").strip() or None


@cache
def warn_without_commit(device_type: str) -> None:
    """A line, once a process, where figures of a GPU are about to be saved that name no commit.

    They are saved all the same: a figure that can be repeated is better than none.
    """
    if device_type == "cuda" and _commit() is None:
        sys.stderr.write(
            "warning: no commit stands beside what is saved: this tree is no git checkout;"
            " set LLMQAT_COMMIT to the commit it was copied from\n"
        )


def _cuda_versions() -> dict[str, Any]:
    """Versions that a GPU's figure depends on beside torch's: Triton, CUDA, the driver."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"triton": triton, "cuda": torch.version.cuda, "driver": driver_version()}


def driver_version() -> str | None:
    """Version of the NVIDIA driver, as `nvidia-smi` gives it; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return None
    lines = found.stdout.strip().splitlines()
    return lines[0].strip() if found.returncode == 0 and lines else None


def require_device(name: str) -> torch.device:
    """The device, or SystemExit 1 with one line where torch sees no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("--device cuda: torch sees no CUDA device here; use --device cpu\n")
        raise SystemExit(1)
    return torch.device(name)


def _processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(name: str, result: dict[str, Any], device: torch.device | None = None) -> Path:
    """Write ``results/<name>.json`` with the environment; returns the path."""
    from llmqat.io import write_json

    RESULTS.mkdir(exist_ok=True)
    warn_without_commit("cpu" if device is None else device.type)
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment(device), **result})
    return path
