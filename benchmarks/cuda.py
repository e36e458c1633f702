"""Timing on a CUDA device: cold inputs and results, graph replay, events.

One sample runs the call on several copies of its inputs in turn, more than four times the L2 cache
between two uses of the same copy, so that data comes from memory as it does inside a model. Every
call of a turn writes to memory of its own, for the same reason. The turn is captured as one CUDA
graph and replayed, which takes the host out of the time; a call that cannot be captured (it waits
for the device) is timed by events around eager calls, host included, and its row says ``events``.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.entry import Call, everything
from benchmarks.timing import cuda_seconds, interleaved

FLUSH = 4
"""Times the L2 cache that is read between two uses of the same data."""
MAX_COPIES = 64
SAMPLE_SECONDS = 2e-3
GRAPH_SECONDS = 5e-4
GRAPH_CALLS = 64
"""A graph holds calls for about half a millisecond, at most 64 of them: the gap between two replays
is microseconds, as much as one call of a small product."""
WARMUP = 3
MIB = 2**20


def copies_for(traffic: int, l2_bytes: int) -> int:
    """How many copies of the inputs take turns, for a call that moves ``traffic`` bytes.

    Rows so small that they would need more than MAX_COPIES stay partly in the cache.
    """
    return max(1, min(MAX_COPIES, math.ceil(FLUSH * l2_bytes / max(traffic, 1))))


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def turns_in_graph(seconds: float, calls: int) -> int:
    """How many turns of ``calls`` calls, ``seconds`` together, one graph holds."""
    return max(1, min(GRAPH_CALLS // calls, math.ceil(GRAPH_SECONDS / max(seconds, 1e-7))))


def turn(calls: Sequence[Call]) -> Callable[[], None]:
    """One call on each copy."""

    def run() -> None:
        # All results are held to the end of the turn: otherwise the next call would be given the
        # memory of the last result, which is still in the cache, and would write faster than
        # memory takes it. Results are part of a call's traffic, so that those of all copies are no
        # more than `copies_for` lets the copies move: FLUSH times the cache and one call.
        kept = [call() for call in calls]
        del kept

    return run


def waits(run: Callable[[], Any]) -> bool:
    """Whether the call waits for the device (``.item()``, a copy from the host)."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """``run`` as a CUDA graph and ``graph``, or itself and ``events`` if it cannot be captured.

    It has to have run before (compilers, libraries and caches are warm then). A call that waits is
    not even tried: a capture that fails may leave torch's random generator unusable.
    """
    if waits(run):
        return run, "events"
    here = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        run()
    here.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context restores the stream where the capture fails to end.
        with (
            torch.cuda.stream(here),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            run()
    except (RuntimeError, AssertionError):  # it allocates or launches behind torch's back
        torch.cuda.synchronize()
        return run, "events"
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, "graph"


def peak_bytes(call: Call) -> int:
    """Memory that one call needs on top of its inputs and results."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = everything(call())
    torch.cuda.synchronize()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    return max(0, torch.cuda.max_memory_allocated() - before - sum(kept.values()))


def times(
    candidates: dict[str, Sequence[Call]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of one call of each candidate by round, in turns, and how each was timed.

    ``candidates``: name -> the call on each copy of the inputs.
    """
    loops: dict[str, Callable[[], Any]] = {}
    counts: dict[str, int] = {}
    how: dict[str, str] = {}
    for name, calls in candidates.items():
        run = turn(calls)
        for _ in range(WARMUP):
            run()
        replay, how[name] = captured(run)
        once = min(cuda_seconds(replay) for _ in range(3))
        inside = turns_in_graph(once, len(calls)) if how[name] == "graph" else 1
        if inside > 1:
            replay, how[name] = captured(turn([run] * inside))
            once = min(cuda_seconds(replay) for _ in range(3))
        repeats = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
        loops[name] = turn([replay] * repeats)
        counts[name] = repeats * inside * len(calls)
    measured = interleaved(loops, rounds, timer=cuda_seconds)
    return {name: [t / counts[name] for t in values] for name, values in measured.items()}, how


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
