"""What the machine can do at best, measured in the same run as the ops: bandwidth and GEMM peaks.

Bandwidth depends on which cache the data fits, so it is measured at several footprints, and an op
is held against the largest measured footprint that is not above its own traffic (the faster roof,
never the kinder one). Every figure is the best round: a roof, not an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import llmqat_kernels as qk
from benchmarks.entry import Cost
from benchmarks.timing import Timer, interleaved

FOOTPRINTS = {"cpu": tuple(2**exponent for exponent in (18, 20, 22, 24, 26, 28)), "cuda": (2**30,)}
"""256 KiB (a core's own cache) to 256 MiB (memory); on a GPU memory only, where inputs are cold."""
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
"""Large enough to hide the edges of a tile, small enough for a fraction of a second."""


@dataclass(frozen=True)
class Roofline:
    """``bandwidth``: footprint in bytes -> bytes a second; the peaks in operations a second."""

    bandwidth: Mapping[int, float]
    fp32: float
    bf16: float
    int8: float

    def bandwidth_at(self, traffic: int) -> float:
        """Bytes a second for this much traffic."""
        smaller = [footprint for footprint in self.bandwidth if footprint <= traffic]
        return self.bandwidth[max(smaller, default=min(self.bandwidth))]

    def bound(self, cost: Cost, dtype: torch.dtype) -> tuple[float, str]:
        """Least seconds of one call, and which of memory and compute sets them."""
        # A 16-bit GEMM may be done in either width, whichever is faster here.
        floats = self.fp32 if dtype == torch.float32 else max(self.fp32, self.bf16)
        compute = cost.flops / floats + cost.int_ops / self.int8
        memory = cost.bytes / self.bandwidth_at(cost.bytes)
        return (compute, "compute") if compute > memory else (memory, "memory")


def repeated(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """``times`` calls in a row."""

    def run() -> None:
        for _ in range(times):
            function()

    return run


def repetitions(function: Callable[[], Any], timer: Timer, seconds: float) -> int:
    """How many calls take at least ``seconds``; runs it a few times to find out."""
    timer(function)
    return max(1, math.ceil(seconds / max(min(timer(function) for _ in range(2)), 1e-7)))


def _best(functions: Mapping[str, Callable[[], Any]], timer: Timer, seconds: float) -> float:
    """Seconds of the fastest call of the fastest function."""
    counts = {name: repetitions(f, timer, seconds) for name, f in functions.items()}
    loops = {name: repeated(f, counts[name]) for name, f in functions.items()}
    times = interleaved(loops, rounds=3, timer=timer)
    return min(min(values) / counts[name] for name, values in times.items())


def _bandwidth(footprint: int, device: torch.device, timer: Timer, seconds: float) -> float:
    """Bytes a second of a copy; on a CPU, of the fastest of it and two ways to read everything."""
    source = torch.zeros(footprint // 4, device=device)
    half = source[: source.numel() // 2]
    target = torch.empty_like(half)
    tests: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(half)}
    if device.type == "cpu":
        tests |= {"sum": lambda: source.sum(), "dot": lambda: torch.dot(source, source)}
    return footprint / _best(tests, timer, seconds)


def _int8_gemms(size: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """torch's int8 GEMM and this package's: a peak that a kernel here beats is no peak."""
    a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    tests: dict[str, Callable[[], Any]] = {"torch._int_mm": lambda: torch._int_mm(a, a.T)}
    if device.type == "cpu":
        ones = torch.ones(size, device=device)
        w = qk.repack_weight(a, 8)
        tests["repacked_matmul"] = lambda: qk.repacked_matmul(a, ones, w, ones, n=size, w_bits=8)
    return tests


def measure(device: torch.device, timer: Timer, seconds: float = 0.05) -> Roofline:
    """Measure the roofline of ``device``; each probe runs for about ``seconds`` a round."""
    size = GEMM_SIZE[device.type]
    work = 2 * size**3
    wide = torch.randn(size, size, device=device)
    half = wide.bfloat16()
    return Roofline(
        {f: _bandwidth(f, device, timer, seconds) for f in FOOTPRINTS[device.type]},
        fp32=work / _best({"fp32": lambda: wide @ wide}, timer, seconds),
        bf16=work / _best({"bf16": lambda: half @ half}, timer, seconds),
        int8=work / _best(_int8_gemms(size, device), timer, seconds),
    )


def describe(roofline: Roofline) -> str:
    """Two lines for the head of a table."""
    sizes = ", ".join(
        f"{footprint >> 10} KiB {rate / 1e9:.1f}" for footprint, rate in roofline.bandwidth.items()
    )
    peaks = ", ".join(
        f"{name} {getattr(roofline, name) / 1e9:.0f}" for name in ("fp32", "bf16", "int8")
    )
    return f"Bandwidth by footprint, GB/s: {sizes}.\nGEMM peak, GOP/s: {peaks}."
