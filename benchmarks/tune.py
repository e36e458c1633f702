"""Time the candidate tiles of the Triton kernels on this GPU and write its architecture's table.

    python -m benchmarks.tune [--op NAME ...] [--rounds 7] [--budget SECONDS]

For every bucket of shapes that the cases of `benchmarks.registry` ask for: the candidates of the
kernel (``CANDIDATES`` of its file) must give the bits of the default tile, then they take turns
with it as benchmarks/cuda.py says: on inputs that are not in the cache, by replays of a CUDA graph,
since a call from Python takes longer than many of these products. A candidate that is at least 2 %
faster over all cases of the bucket goes into llmqat_kernels/backends/triton/tiles/sm_<arch>.json,
from where launches take it; other buckets keep the kernel's own heuristic. Only forms that
`benchmarks.kernel_report` checks are candidates.

The table is written after every case, so that a run that is ended keeps what it found (for a bucket
whose cases were not all measured: over those that were). With --budget no case starts after that
many seconds, those that README's GPU table reads come first, and the command for the others is
printed. A candidate that raises is refused; a case that does is named and left out, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import cells, cuda
from benchmarks.cells import DeviceLost
from benchmarks.entry import Call, Job, everything, reason_of
from benchmarks.kernel_forms import kernels_of, modules
from benchmarks.registry import Case, cases
from benchmarks.run import most_important_first
from benchmarks.timing import environment, warn_without_commit
from llmqat.io import write_text
from llmqat_kernels import use_backend
from llmqat_kernels.backends.triton import interpreting, tiles
from llmqat_kernels.backends.triton.launch import Variant
from llmqat_kernels.testing import assert_same_bits

GAIN = 0.98
"""A candidate must take at most this share of the default's time."""
ASKING = (
    "quantized_linear",
    "quantized_matmul",
    "repacked_matmul",
    "qat_linear",
    "qat_matmul",
    "integer_group_matmul",
)
"""The entries of the registry that ask for a tile with candidates; nothing else is built. The row
kernels choose by the length of the row alone, and another tile of the loss sums in another order,
which a tile must not."""
DEFAULT = "default"
ADVICE = "run again without it (--op names the entries to measure)"
Candidates = Mapping[str, Sequence[Any]]
Times = Callable[[dict[str, Sequence[Call]], int], tuple[dict[str, list[float]], dict[str, str]]]
"""`cuda.times`: the calls of each candidate on copies of the inputs, rounds -> seconds of a call,
and whether they were timed by a ``graph`` or by ``events``."""
Timed = list[tuple[str, str, str]]
"""(operator, bucket, how it was timed) of what was timed."""


def compiled_as(variants: Iterable[Variant], tile: Any) -> bool:
    """Whether one of ``variants`` has every size of ``tile``: then its gates were checked."""
    wanted = asdict(tile)
    options = {name: wanted.pop(name) for name in ("num_warps", "num_stages") if name in wanted}
    sizes = Counter(wanted.values())
    return any(
        all(getattr(variant, name) == value for name, value in options.items())
        and sizes <= Counter(v for v in variant.constants.values() if type(v) is int)
        for variant in variants
    )


def candidates(arch: int) -> dict[str, tuple[Any, ...]]:
    """Operator of `tiles.tile_for` -> the tiles worth timing on an architecture."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in modules():
        listed: Candidates = getattr(kernels_of(name), "CANDIDATES", {})
        checked = list(kernels_of(name).variants(arch)) if listed else []
        for op, choices in listed.items():
            found[op] = tuple(tile for tile in choices if compiled_as(checked, tile))
    return found


@dataclass
class Bucket:
    """What was measured for one operator and bucket.

    Attributes:
        default_us: the default tile's time in each case.
        ratios: tile -> its time over the default's, in each case; only tiles that gave the same
            bits everywhere are complete.
        refused: tile -> why it cannot be used.
    """

    default: Any
    default_us: list[float] = field(default_factory=list)
    ratios: dict[Any, list[float]] = field(default_factory=dict)
    refused: dict[Any, str] = field(default_factory=dict)

    def best(self) -> dict[str, Any] | None:
        """The entry of the table, or None if no candidate is enough faster in the mean."""
        whole = len(self.default_us)
        means = {
            tile: math.exp(statistics.fmean(map(math.log, values)))
            for tile, values in self.ratios.items()
            if len(values) == whole and tile not in self.refused
        }
        tile = min(means, key=lambda t: means[t], default=None)
        if tile is None or means[tile] > GAIN:
            return None
        microseconds = statistics.fmean(self.default_us)
        return {
            "tile": asdict(tile),
            "default": asdict(self.default),
            "default_us": round(microseconds, 2),
            "ratio": round(means[tile], 4),
        }


Buckets = dict[tuple[str, str], Bucket]


def refusal(call: Callable[[], Any], expected: Sequence[torch.Tensor]) -> str:
    """Why the tile that ``call`` forces cannot be used; an empty string if its result has the same
    bits.
    """
    from triton.runtime.errors import OutOfResources

    try:
        for actual, want in zip(everything(call()), expected, strict=True):
            assert_same_bits(actual, want)
    except OutOfResources as error:
        return f"does not fit: {error}"
    except AssertionError as error:
        return f"other bits: {error}".splitlines()[0]
    except Exception as error:  # a compiler, memory: the other candidates go on
        return f"failed: {reason_of(error)}"
    return ""


def measure(
    job: Job,
    choices: Candidates,
    buckets: Buckets,
    times: Times,
    rounds: int,
    others: Callable[[], Sequence[Call]] = tuple,
) -> Timed:
    """Time every candidate of the operators that ``job`` asks a tile for.

    Args:
        others: makes the same call on further copies of the inputs; not called if nothing is timed.

    Raises:
        AssertionError: the default tile does not pass the gate of the case.
    """
    job.gate()
    with tiles.asked() as asked:
        expected = everything(job.call())
    found: dict[str, dict[str, Any]] = {}
    for question in asked:
        if question.op in choices:
            found.setdefault(question.op, {})[question.key] = question.default
    # Two shapes in one call: neither can be timed on its own.
    alone = {op: next(iter(keys.items())) for op, keys in found.items() if len(keys) == 1}
    calls = [job.call, *others()] if alone else []
    timed = []
    for op, (key, default) in alone.items():
        bucket = buckets.setdefault((op, key), Bucket(default))
        how = _measure_op(op, bucket, default, choices[op], calls, expected, times, rounds)
        timed.append((op, key, how))
    return timed


def with_tile(op: str, tile: Any, call: Call) -> Call:
    """``call`` with a tile forced on an operator."""

    def run() -> Any:
        with tiles.forced(op, tile):
            return call()

    return run


def _measure_op(
    op: str,
    bucket: Bucket,
    default: Any,
    choices: Sequence[Any],
    calls: Sequence[Call],
    expected: Sequence[torch.Tensor],
    times: Times,
    rounds: int,
) -> str:
    """Add one case to a bucket; how it was timed."""
    tried = {DEFAULT: default}
    for index, tile in enumerate(choices):
        if tile == default:
            continue
        why = refusal(with_tile(op, tile, calls[0]), expected)
        if why:
            bucket.refused[tile] = why
            cells.check_alive(expected[0].device, f"{op} {tile}", why, ADVICE)
            cuda.release(expected[0].device)
        else:
            tried[str(index)] = tile
    seconds, how = times(
        {name: [with_tile(op, tile, call) for call in calls] for name, tile in tried.items()},
        rounds,
    )
    base = seconds.pop(DEFAULT)
    bucket.default_us.append(1e6 * statistics.median(base))
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        bucket.ratios.setdefault(tried[name], []).append(ratio)
    return "graph" if set(how.values()) == {"graph"} else "events"


def merged(before: Mapping[str, Any], buckets: Buckets, where: Mapping[str, Any]) -> dict[str, Any]:
    """The new table: buckets that were measured again are replaced, the others stay."""
    entries = {op: dict(found) for op, found in before["tiles"].items()}
    for (op, key), bucket in buckets.items():
        if not bucket.default_us:
            continue  # its cases failed: what was known stays
        entry = bucket.best()
        entries.setdefault(op, {}).pop(key, None)
        if entry:
            entries[op][key] = entry
    kept = {op: dict(sorted(found.items())) for op, found in sorted(entries.items()) if found}
    return {"arch": before["arch"], "source": "measured", **where, "tiles": kept}


def further_calls(case: Case, device: torch.device) -> list[Call]:
    """The call of a case on all copies of its inputs but the first."""
    copies = cells.copies_on(device, case.cost.bytes)
    return [case.build(device).call for _ in range(copies - 1)]


def case_or_reason(
    case: Case,
    device: torch.device,
    choices: Candidates,
    buckets: Buckets,
    times: Times,
    rounds: int,
) -> Timed | str:
    """What `measure` timed of a case, or why it could not.

    Raises:
        DeviceLost: the device does not answer any more.
    """
    others = partial(further_calls, case, device)
    try:
        return measure(case.build(device), choices, buckets, times, rounds, others)
    except DeviceLost:
        raise
    except AssertionError as error:
        return f"gate failed: {' '.join(str(error).split())}"
    except Exception as error:  # memory, a compiler: the other cases go on
        why = f"failed: {reason_of(error)}"
        cells.check_alive(device, case.name, why, ADVICE)
    return why


def sweep(
    chosen: Sequence[Case],
    device: torch.device,
    choices: Candidates,
    times: Times,
    rounds: int,
    write: Callable[[Buckets], None],
    deadline: float = math.inf,
) -> tuple[Buckets, bool]:
    """Every case until the deadline (of time.monotonic), with ``write`` after each once there is a
    bucket; whether a case failed.
    """
    buckets, failed = Buckets(), False
    for index, case in enumerate(chosen):
        if time.monotonic() > deadline:
            ops = " ".join(dict.fromkeys(left.entry.op for left in chosen[index:]))
            print(f"--budget: {len(chosen) - index} cases left out; python -m benchmarks.tune --op"
                  f" {ops} measures them")  # fmt: skip
            break
        label = f"{case.name}, {case.shape.label}, {case.dtype_name}"
        timed = case_or_reason(case, device, choices, buckets, times, rounds)
        if buckets:
            write(buckets)
        if isinstance(timed, str):
            failed = True
            print(f"{label}: {timed}", file=sys.stderr)
            cuda.release(device)
            continue
        for op, key, how in timed:
            print(f"{label}: {op} {key} ({how})", flush=True)
    return buckets, failed


def writer(path: Path, arch: int, device: torch.device) -> Callable[[Buckets], None]:
    """Writes the table of an architecture with what was measured so far in it."""
    before, found = tiles.table(arch), environment(device)
    warn_without_commit(device.type)
    where = {"device": found["processor"], **{k: found[k] for k in ("triton", "torch", "commit")}}

    def write(buckets: Buckets) -> None:
        text = json.dumps(merged(before, buckets, where), indent=1) + "\n"
        tiles.parse(text, path.name)
        write_text(path, text)

    return write


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Time the candidate tiles on this GPU."
    )
    parser.add_argument("--op", nargs="+", choices=ASKING, help="these benchmark entries only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, help="start no case after this many seconds")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or interpreting():
        print("tune: there is no CUDA device here (or TRITON_INTERPRET=1 is set); tiles are timed"
              " on the GPU they are for", file=sys.stderr)  # fmt: skip
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    return cells.guarded(lambda: tune(options, device))


def tune(options: argparse.Namespace, device: torch.device) -> int:
    """Every case on a device, then what came of each bucket; the exit status."""
    deadline = math.inf if options.budget is None else time.monotonic() + options.budget
    arch = tiles.architecture(device)
    path = tiles.FOLDER / f"sm_{arch}.json"
    chosen = list(cases(options.op or ASKING, device_type="cuda"))
    if options.budget is not None:
        chosen = most_important_first(chosen, "cuda")
    with use_backend("triton"):
        buckets, failed = sweep(
            chosen, device, candidates(arch), cuda.times, options.rounds,
            writer(path, arch, device), deadline,
        )  # fmt: skip
    for (op, key), bucket in buckets.items():
        for tile, why in bucket.refused.items():
            print(f"{op} {key}: {tile}: {why}", file=sys.stderr)
        print(f"{op} {key}: {bucket.best() or 'the default stays'}")
    print(f"{path.name}: {sum(1 for b in buckets.values() if b.best())} measured tiles")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
