"""One QAT step against the same distillation step without quantization, and against eager QAT.

    python -m benchmarks.qat_slice [--device cuda] [--model slice smollm2 tiny] [--save]
    python -m benchmarks.qat_slice --saved-only --model slice --tokens 128 --save

Models: `slice` (LLaMA-7B's width, 4 layers, 2048 tokens), `smollm2` (SmolLM2-135M whole, 2048
tokens), `narrow` (SmolLM2's width, 2 layers, 256 tokens), `deep` (30 layers of next to no
arithmetic: what launching takes the host) and `tiny`; random weights in bf16. Each candidate is a
model of its own on the same data, teacher, loss (this package's) and optimizer:

* plain: no quantization, SDPA;
* eager: the paper's quantizers (Eq. 3) in plain torch operations on weights, inputs of linears, K
  and V, as they are commonly published (32 bytes a value forward, 14 backward), and lean (18, 0);
* llmqat: `llmqat.prepare`, and with `fused` its fused norms, MLP and attention glue; with
  `composed gradients` torch multiplies dequantized codes in the linears' backward.

A step is teacher, student forward, loss, backward, AdamW; candidates take turns. Reported with and
without activation checkpointing: seconds, on a GPU launched from Python and as one CUDA graph
(without the host, which small models wait for), memory of a step on top of weights and optimizer
(GPU; codes of weights belong to the step), and the bytes that autograd keeps between forward and
backward. These are counted by storage through `saved_tensors_hooks`, without parameters; codes of
weights, which live as long as the weights, are counted beside them. They depend on the model, not
on the device, and ours over plain not on the tokens: `--saved-only` counts them on a CPU at real
widths, one candidate at a time. (The eager candidates also keep a fake-quantized copy of every
weight, whatever the tokens.)

Results are written after every model, with and without checkpointing on its own. A candidate that
raises or whose loss is wrong is named with the reason and not timed; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

import llmqat_kernels as qk
from benchmarks import cells, cuda
from benchmarks.cells import DeviceLost
from benchmarks.entry import reason_of
from benchmarks.qat_models import (
    MODELS,
    SETTING,
    Candidate,
    Model,
    Step,
    candidates,
    saved_bytes,
)
from benchmarks.timing import interleaved, require_device, save, summary

BARS = {"time over plain": 0.95, "eager over ours": 2.0, "saved over plain": 0.60}
GRAPH = ", as a graph"
"""Ends the names of ratios between steps that are replayed as CUDA graphs."""
LOSS_TOLERANCE = 0.05
MIB = 2**20
MODES = {"checkpointing": True, "no checkpointing": False}
"""README's figures are those with activation checkpointing: they come first."""
Failed = dict[str, str]
"""What could not be measured -> why."""
Keep = Callable[[dict[str, Any]], None]
DEFAULTS = {"cuda": ("slice", "smollm2"), "cpu": ("narrow",)}
T = TypeVar("T")


def attempt(name: str, failed: Failed, device: torch.device, call: Callable[[], T]) -> T | None:
    """The result of ``call``; None where it raises: then ``failed`` says why, and memory is freed.

    Raises:
        DeviceLost: the device does not answer any more.
    """
    try:
        return call()
    except DeviceLost:
        raise
    except Exception as error:  # memory, a kernel: the others go on
        failed[name] = reason_of(error)
        advice = "run again without it (--model, --backend)"
        cells.check_alive(device, name, failed[name], advice)
    cuda.release(device)
    return None


def gate(losses: dict[str, float]) -> Failed:
    """Why a candidate is not timed: a loss must be finite, and a quantized one near the eager
    candidate's.
    """
    eager = losses.get("eager", math.nan)
    wrong = {}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            wrong[name] = f"gate: loss {loss}"
        elif name != "plain" and not abs(loss / eager - 1) <= LOSS_TOLERANCE:
            wrong[name] = f"gate: loss {loss}, eager {eager}"
    return wrong


def first_step(
    sizes: Model, candidate: Candidate, teacher: nn.Module, device: torch.device
) -> tuple[Step, float]:
    """A candidate after a step, with activation checkpointing, and its loss."""
    step = Step(sizes, candidate, teacher, device)
    step.checkpointing(True)
    return step, float(step.run())


def measure(
    name: str, device: torch.device, rounds: int, deadline: float, failed: Failed, keep: Keep
) -> dict[str, Any]:
    """Times, memory and saved bytes of every candidate on one model; ``keep`` gets what is known
    after each mode, ``failed`` what could not be measured.
    """
    sizes = MODELS[name]
    teacher = sizes.build(device, seed=2).eval().requires_grad_(False)
    made = {
        key: attempt(
            f"{name}, {key}", failed, device, partial(first_step, sizes, made_by, teacher, device)
        )
        for key, made_by in candidates().items()
    }
    losses = {key: found[1] for key, found in made.items() if found is not None}
    wrong = gate(losses)
    failed |= {f"{name}, {key}": why for key, why in wrong.items()}
    steps = {key: found[0] for key, found in made.items() if found and key not in wrong}
    del made
    result: dict[str, Any] = {"sizes": vars(sizes), "loss": {key: losses[key] for key in steps}}
    for index, (label, on) in enumerate(MODES.items()):
        if index and time.monotonic() > deadline:
            result["left_out"] = f"{label}: --budget"
            break
        where = f"{name}, {label}"
        mode = partial(measure_mode, where, steps, on, device, rounds, failed)
        found = attempt(where, failed, device, mode)
        if found:
            result[label] = found
            keep(result)
    return result


def measure_mode(
    name: str,
    steps: dict[str, Step],
    on: bool,
    device: torch.device,
    rounds: int,
    failed: Failed,
) -> dict[str, Any]:
    """Every candidate with or without activation checkpointing; nothing if none can run."""
    ready = {}
    for key, step in steps.items():  # a first run of each does not count
        step.checkpointing(on)
        if attempt(f"{name}, {key}", failed, device, lambda s=step: float(s.run())) is not None:
            ready[key] = step
    if not ready:
        return {}
    runs = {key: step.run for key, step in ready.items()}
    seconds = interleaved(runs, rounds, warmup=0, timer=cells.timer_of(device))
    found: dict[str, Any] = {
        "seconds": {key: summary(values) for key, values in seconds.items()},
        "saved_bytes": {key: saved_bytes(s.student, s.forward) for key, s in ready.items()},
    }
    if device.type == "cuda":
        found["peak_bytes"] = {key: step.peak_bytes() for key, step in ready.items()}
        found["graph_seconds"] = graph_seconds(name, ready, device, rounds, failed)
    if compared := ratios(found):
        found["ratios"] = compared
    return found


def graph_seconds(
    name: str, steps: dict[str, Step], device: torch.device, rounds: int, failed: Failed
) -> dict[str, dict[str, float]]:
    """The same steps, each replayed as one CUDA graph; without those that cannot be captured."""
    replays = {}
    for key, step in steps.items():
        where = f"{name}, {key}, CUDA graph"
        found = attempt(where, failed, device, partial(cuda.captured, step.run_whole))
        if found is not None and found[1] == "graph":
            replays[key] = found[0]
        elif found is not None:
            failed[where] = "the step cannot be captured"
    if not replays:
        return {}
    seconds = interleaved(replays, rounds, timer=cells.timer_of(device))
    return {key: summary(values) for key, values in seconds.items()}


def count_saved(
    name: str, device: torch.device, tokens: int | None, failed: Failed
) -> dict[str, Any] | None:
    """Saved bytes of every candidate without checkpointing: forwards only, one model at a time, and
    so without those whose backward alone differs; None where those of the plain one or of all of
    ours are missing.
    """
    sizes = MODELS[name] if tokens is None else replace(MODELS[name], tokens=tokens)

    def count(candidate: Candidate) -> dict[str, int]:
        step = Step(sizes, candidate, None, device)
        return saved_bytes(step.student, step.forward)

    saved = {}
    for key, candidate in candidates().items():
        if candidate.composed:
            continue
        found = attempt(f"{name}, {key}", failed, device, partial(count, candidate))
        if found is not None:
            saved[key] = found
        gc.collect()
    if "plain" not in saved or "llmqat" not in saved:
        return None
    plain = saved["plain"]["activations"]
    shares = {key: value["activations"] / plain for key, value in saved.items()}
    return {"sizes": vars(sizes), "saved_bytes": saved, "saved_over_plain": shares}


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures that the bars are about, for each of our forms; none without both baselines."""
    if not {"plain", "eager"} <= set(found["seconds"]):
        return {}
    saved = {key: value["activations"] for key, value in found["saved_bytes"].items()}
    peak = found.get("peak_bytes")
    result = {}
    for ours in (key for key in found["seconds"] if key.startswith("llmqat")):
        result[ours] = {
            **time_ratios(found["seconds"], ours),
            **{
                f"{what}{GRAPH}": value
                for what, value in time_ratios(found.get("graph_seconds", {}), ours).items()
            },
            "saved over plain": saved[ours] / saved["plain"],
        }
        if peak is not None:
            result[ours]["peak over plain"] = peak[ours] / peak["plain"]
    return result


def time_ratios(seconds: dict[str, dict[str, float]], ours: str) -> dict[str, float]:
    """Ratios of medians to each baseline that was timed."""
    middle = {key: value["p50"] for key, value in seconds.items()}
    if ours not in middle:
        return {}
    compared = {"time over plain": ("plain", False), "eager over ours": ("eager", True)}
    compared["lean eager over ours"] = ("eager, lean", True)
    return {
        what: middle[baseline] / middle[ours] if over else middle[ours] / middle[baseline]
        for what, (baseline, over) in compared.items()
        if baseline in middle
    }


def table(name: str, result: dict[str, Any]) -> str:
    """The result of one model as markdown."""
    sizes = ", ".join(f"{key} {value}" for key, value in result["sizes"].items())
    lines = [f"{name}: {sizes}", ""]
    head = "| checkpointing | candidate | step ms (p20-p80) | as a CUDA graph ms | peak MiB |"
    lines += [head + " saved MiB (weight codes) |", "|---|---|---|---|---|---|"]
    for label in ("no checkpointing", "checkpointing"):
        found = result.get(label)
        if found is None:
            continue
        for key, figure in found["seconds"].items():
            p50, p20, p80 = (1e3 * figure[p] for p in ("p50", "p20", "p80"))
            graph = found.get("graph_seconds", {}).get(key)
            saved = found["saved_bytes"][key]
            peak = found["peak_bytes"][key] / MIB if "peak_bytes" in found else None
            lines.append(
                f"| {'on' if label == 'checkpointing' else 'off'} | {key} |"
                f" {p50:.1f} ({p20:.1f}-{p80:.1f}) |"
                f" {'' if graph is None else format(1e3 * graph['p50'], '.1f')} |"
                f" {'' if peak is None else f'{peak:.0f}'} |"
                f" {saved['activations'] / MIB:.2f} ({saved['weight_codes'] / MIB:.2f}) |"
            )
        for ours, values in found.get("ratios", {}).items():
            shown = ", ".join(f"{what} {value:.3f}" for what, value in values.items())
            lines.append(f"\n{ours}, {label}: {shown}")
    return "\n".join(lines)


class Kept:
    """The models that were measured, on disk with `--save` as soon as there is one."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self._args, self._device = args, device
        self.models: dict[str, Any] = {}
        self.failed: Failed = {}

    def put(self, name: str, result: dict[str, Any]) -> None:
        """One model, or what is known of it."""
        self.models[name] = result
        if not self._args.save:
            return
        found = {"setting": SETTING, "models": self.models, "failed": self.failed}
        if self._args.saved_only:
            save("saved_activations", found, self._device)
        else:
            save(f"qat_slice_{self._device.type}", found | {"bars": BARS}, self._device)

    def measure(self, name: str, deadline: float) -> None:
        """Time one model."""
        args, device = self._args, self._device
        with nullcontext() if args.backend == "auto" else qk.use_backend(args.backend):
            work = partial(
                measure, name, device, args.rounds, deadline, self.failed, partial(self.put, name)
            )
            result = attempt(name, self.failed, device, work)
        if result is not None:
            print(table(name, result) + "\n", flush=True)
        if name in self.models:
            self.put(name, self.models[name])  # with what failed since

    def count(self, name: str) -> None:
        """Count the saved bytes of one model."""
        found = count_saved(name, self._device, self._args.tokens, self.failed)
        if found is not None:
            shares = found["saved_over_plain"].items()
            print(f"{name}, saved over plain: " + ", ".join(f"{k} {v:.3f}" for k, v in shares))
            self.put(name, found)

    def close(self) -> int:
        """Name what failed; the exit status."""
        for name, why in self.failed.items():
            print(f"{name}: failed: {why}", file=sys.stderr)
        return int(bool(self.failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Gate, measure, print; `--save` writes results/qat_slice_<device>.json. The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto", help="of the operators; auto by default")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--tokens", type=int, help="instead of the model's own")
    parser.add_argument("--saved-only", action="store_true", help="count saved bytes, time nothing")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.tokens or 1) < 1:
        parser.error("--rounds, --threads and --tokens must be at least 1")
    if args.tokens and not args.saved_only:
        parser.error("--tokens belongs to --saved-only; steps are timed at the model's own tokens")
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    return cells.guarded(lambda: run_models(args, device))


def run_models(args: argparse.Namespace, device: torch.device) -> int:
    """Every model within the budget; the exit status."""
    deadline = time.monotonic() + args.budget
    kept = Kept(args, device)
    for name in args.model or DEFAULTS[args.device]:
        if time.monotonic() > deadline:
            print(f"{name}: left out by --budget")
        elif args.saved_only:
            kept.count(name)
        else:
            kept.measure(name, deadline)
        cuda.release(device)
    return kept.close()


if __name__ == "__main__":
    sys.exit(main())
