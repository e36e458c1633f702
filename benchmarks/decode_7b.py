"""Decode and prefill of a 7B model with random weights: the engine against what one uses today.

    python -m benchmarks.decode_7b --device cuda [--quick] [--save] [--budget 140] [--batch 1 16 64]

The packed model is drawn on the device (no float weights), W4A8 with KV8 and KV4 in `paper` mode,
in the engine with CUDA graphs, on the backend that `auto` chooses and with the CUDA C++ kernels
first. Baselines on a bf16 model of the same sizes: `generate` of
transformers (its own cache, then a static one, which it compiles), and a small compiled decoder in
one CUDA graph with bf16 and with torch's 4-bit weights (benchmarks/compiled_decode.py). All decode
up to a context of 2048 tokens. Candidates take turns; those that do not fit the memory together are
measured one after another, and a note says so. `generate` rates count from the first token to the
last, so that no prefill is in them; `steps` are decode steps on a cache filled with random codes.
Before anything is timed, two layers of the model run in the engine and on the reference backend:
logits within 5 %, and tokens with graphs as without. Results are written after every group of
candidates. On a CPU: a tiny model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks import cells, cuda
from benchmarks.cells import DeviceLost
from benchmarks.compiled_decode import PlainDecoder
from benchmarks.decode_rates import (
    Rate,
    decoder_steps,
    engine_generate,
    engine_prefill,
    engine_steps,
    prompts_of,
    transformers_generate,
    transformers_prefill,
)
from benchmarks.random_model import (
    config_of,
    decode_bound,
    decode_bytes,
    float_model,
    packed_model,
)
from benchmarks.roofline import measure
from benchmarks.timing import require_device, save, summary
from benchmarks.turns import Turns
from llmqat import Engine
from llmqat_kernels import use_backend

BATCHES = (1, 16, 64)
CONTEXT = 2048
TOKENS = 128
GATE_TOLERANCE = 0.05
GATE_EQUAL = 0.5
"""Share of tokens: the head is a library's bf16 product, whose ties may fall otherwise in a graph;
one that reads stale inputs gives none."""
KV_BITS = (8, 4)
OURS = "llmqat W4A8KV8"
OURS_CUDA = f"{OURS}, CUDA C++ first"
INT4, COMPILED, EAGER = "compiled int4", "compiled bf16", "transformers bf16"
T = TypeVar("T")


def gate(name: str, device: torch.device) -> dict[str, Any]:
    """Two layers of the model in the engine against the reference backend, and graphs against none.

    Raises:
        AssertionError: they differ.
    """
    found: dict[str, Any] = {}
    for bits in KV_BITS:
        model = packed_model(config_of(name, layers=2), f"4-8-{bits}", "paper", device)
        prompts = prompts_of(4, 12, model.config.vocab_size)
        engine = Engine(model, max_slots=4, max_len=32)
        with use_backend("reference"):
            reference = Engine(model, max_slots=4, max_len=32, graphs=False)
            expected = reference.prefill(range(4), prompts).double()
        logits = engine.prefill(range(4), prompts).double()
        error = float((logits - expected).norm() / expected.norm())
        if not error <= GATE_TOLERANCE:
            raise AssertionError(f"KV{bits}: logits differ from the reference by {error:.1e}")
        plain = Engine(model, max_slots=4, max_len=32, graphs=False)
        runs = [[done.new_tokens for done in e.generate(prompts, 8)] for e in (engine, plain)]
        pairs = [pair for both in zip(*runs, strict=True) for pair in zip(*both, strict=True)]
        equal = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
        if not equal >= GATE_EQUAL:
            raise AssertionError(f"KV{bits}: with CUDA graphs {equal:.0%} of the tokens are equal")
        captured = list(engine.static.captured)
        found[f"KV{bits}"] = {"logits_error": error, "equal_tokens": equal, "captured": captured}
    return found


def used_up(model: nn.Module) -> Any:
    """What `PlainDecoder` reads of a model, whose linears are freed as it goes on: beside a large
    cache there is no room for them twice.
    """
    base = model.model

    def layers() -> Iterator[nn.Module]:
        for layer in base.layers:
            yield layer
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight = None  # type: ignore[assignment]

    kept = {name: getattr(base, name) for name in ("embed_tokens", "norm", "rotary_emb")}
    left = SimpleNamespace(**kept, layers=layers())
    return SimpleNamespace(config=model.config, lm_head=model.lm_head, model=left)


class Bench:
    """The candidates of one model on one device."""

    def __init__(self, name: str, device: torch.device, context: int, tokens: int) -> None:
        self.name, self.device, self.context, self.tokens = name, device, context, tokens
        self.config = config_of(name)
        self._float: nn.Module | None = None
        self._packed: nn.Module | None = None

    @property
    def packed(self) -> nn.Module:
        """The packed model, drawn when first asked for."""
        if self._packed is None:
            self._packed = packed_model(self.config, "4-8-8", "paper", self.device)
        return self._packed

    @property
    def plain(self) -> nn.Module:
        """The bf16 model, drawn when first asked for."""
        if self._float is None:
            self._float = float_model(self.config, self.device)
        return self._float

    def forget(self) -> None:
        """Drop both models until they are asked for again."""
        self._float = self._packed = None

    def engine(self, batch: int, kv_bits: int) -> Engine:
        """The engine for so many sequences."""
        return Engine(self.packed, max_slots=batch, max_len=self.context, kv_bits=kv_bits)

    def decoder(self, batch: int, int4: bool) -> PlainDecoder:
        """The compiled decoder. A batch uses the bf16 model up: nobody else reads it there."""
        model: Any = self.plain
        if batch > 1:
            model, self._float = used_up(model), None
        compiles = self.device.type == "cuda"
        return PlainDecoder(model, batch, self.context, int4=int4, compiles=compiles)

    def needed(self, batch: int, names: Sequence[str]) -> float:
        """About how many bytes candidates take, the models that they are made from included."""

        def size(w_bits: int, kv_bits: int, sequences: int) -> float:
            return decode_bytes(self.config, w_bits, kv_bits, sequences, self.context)

        ours = [name for name in names if name.startswith("llmqat")]
        total = size(4, 16, 0) if ours else 0.0
        total += sum(size(4, 8 if "KV8" in name else 4, batch + 1) for name in ours)
        if len(ours) < len(names) and batch == 1:  # a batch uses the model up
            total += size(16, 16, 0)
        return total + sum(size(16, 16, batch) for name in names if name not in ours)

    def cuda_first(self, batch: int) -> Rate:
        """Decode steps, or at batch 1 whole generations, with the CUDA C++ kernels first.

        Raises:
            AssertionError: they do not pass the gate.
        """
        with use_backend("cuda"):
            gate(self.name, self.device)
            engine, prompts = self.engine(batch, 8), self._prompts(1)
            run = (
                engine_generate(engine, prompts, self.tokens)
                if batch == 1
                else engine_steps(engine, self.context, self.tokens)
            )

        def timed() -> float:
            with use_backend("cuda"):
                return run()

        return timed

    def _prompts(self, batch: int) -> list[list[int]]:
        return prompts_of(batch, self.context - self.tokens, self.config.vocab_size)

    def decoding(self, batch: int) -> list[dict[str, Callable[[], Rate]]]:
        """Makers of what takes turns at a batch size, in groups, the most important first."""
        context, tokens = self.context, self.tokens
        prompts = self._prompts(batch)

        def steps(kv_bits: int) -> Callable[[], Rate]:
            return lambda: engine_steps(self.engine(batch, kv_bits), context, tokens)

        def compiled(int4: bool) -> Callable[[], Rate]:
            return lambda: decoder_steps(self.decoder(batch, int4), batch, context, tokens)

        own: dict[str, Callable[[], Rate]] = {
            f"{OURS}, steps": steps(8),
            "llmqat W4A8KV4, steps": steps(4),
        }
        other = {OURS_CUDA: lambda: self.cuda_first(batch)} if self.device.type == "cuda" else {}
        if batch > 1:
            return _filled(own, other, {COMPILED: compiled(False)})
        generate = {OURS: lambda: engine_generate(self.engine(batch, 8), prompts, tokens)}
        eager = {EAGER: lambda: transformers_generate(self.plain, prompts, max(4, tokens // 4))}
        static = {
            f"{EAGER}, static cache": lambda: transformers_generate(
                self.plain, prompts, tokens, cache_implementation="static"
            )
        }
        later = [{INT4: compiled(True)}, {COMPILED: compiled(False)}, static]
        return _filled(generate | own | eager, other, *later)

    def prefill(self, rounds: int, deadline: float, skip: Sequence[str] = ()) -> dict[str, Any]:
        """Rates of the prefill of one prompt."""
        (prompt,) = prompts_of(1, self.context - 1, self.config.vocab_size)
        turns = Turns(rounds, self.device, deadline)
        makers = {
            OURS: lambda: engine_prefill(self.engine(1, 8), prompt),
            EAGER: lambda: transformers_prefill(self.plain, prompt),
        }
        turns.add(wanted(makers, skip))
        found = {name: summary(values) for name, values in turns.rates.items()}
        return {"tokens_per_second": found, "notes": turns.notes}

    def bound(self, batch: int, kv_bits: int, bandwidth: float) -> float:
        """Tokens a second at the memory's limit, at the mean context of a run."""
        step = decode_bytes(self.config, 4, kv_bits, batch, self.context - self.tokens / 2)
        return decode_bound(bandwidth, batch, step)


def _filled(*groups: dict[str, T]) -> list[dict[str, T]]:
    return [group for group in groups if group]


def decode_result(
    bench: Bench,
    batch: int,
    rates: Mapping[str, list[float]],
    notes: Mapping[str, str],
    bandwidth: float,
) -> dict[str, Any]:
    """One batch size: rates, bounds, and the ratio of ours to every other; ``ratios_of_cuda`` are
    those of the engine with the CUDA C++ kernels first.
    """
    figures = {name: summary(values) for name, values in rates.items()}
    ours = next((name for name in (OURS, f"{OURS}, steps") if name in figures), None)
    bounds = {f"KV{bits}": bench.bound(batch, bits, bandwidth) for bits in KV_BITS}
    result: dict[str, Any] = {"tokens_per_second": figures, "notes": dict(notes), "bound": bounds}
    others = {n: f["p50"] for n, f in figures.items() if not n.startswith("llmqat")}
    if ours is not None:
        result["ratio_of"] = ours
        result["ratios"] = {name: figures[ours]["p50"] / rate for name, rate in others.items()}
        result["share_of_bound"] = figures[ours]["p50"] / bounds["KV8"]
    if OURS_CUDA in figures:
        rate = figures[OURS_CUDA]["p50"]
        result["ratios_of_cuda"] = {name: rate / other for name, other in others.items()}
        result["share_of_bound_cuda"] = rate / bounds["KV8"]
    return result


def wanted(makers: Mapping[str, T], skip: Sequence[str]) -> dict[str, T]:
    """Those without a word of their name to skip."""
    return {name: make for name, make in makers.items() if not set(skip) & set(name.split())}


def table(title: str, result: Mapping[str, Any]) -> str:
    """One batch size as markdown."""
    lines = [f"\n{title}\n", "| candidate | tok/s (p20-p80) | ours over it |", "|---|---|---|"]
    for name, figure in result["tokens_per_second"].items():
        ratio = result.get("ratios", {}).get(name)
        shown = "" if ratio is None else f"{ratio:.2f}x"
        spread = f"{figure['p20']:.1f}-{figure['p80']:.1f}"
        lines.append(f"| {name} | {figure['p50']:.1f} ({spread}) | {shown} |")
    lines += [f"| {name} | {note} | |" for name, note in result["notes"].items()]
    if "share_of_bound" in result:
        bounds = ", ".join(f"{name} {value:.0f}" for name, value in result["bound"].items())
        share = 100 * result["share_of_bound"]
        lines.append(
            f"\nBound at the measured copy bandwidth, tok/s: {bounds}; {share:.0f} % of it."
        )
    return "\n".join(lines)


def run_all(args: argparse.Namespace, device: torch.device) -> int:
    """Gate, then every batch size, then the prefill; the exit status."""
    begin = time.monotonic()
    tiny = device.type == "cpu"
    name, context, tokens = ("tiny", 24, 6) if tiny else (args.model, CONTEXT, TOKENS)
    batches = args.batch or ((1, 2) if tiny else BATCHES)
    bench = Bench(name, device, context, tokens)
    roofline = measure(device, cells.timer_of(device), 0.002 if args.quick else 0.02)
    bandwidth = roofline.bandwidth_at(int(decode_bytes(bench.config, 4, 8, 1, context)))
    result: dict[str, Any] = {"model": name, "context": context, "tokens": tokens}
    result |= {"copy_bytes_per_second": bandwidth, "batches": {}}
    try:
        result["gate"] = gate(name, device)
    except AssertionError as error:
        sys.stderr.write(f"gate: {error}\n")
        return 1
    for index, batch in enumerate(batches[:1] if args.quick else batches):
        if index and time.monotonic() - begin > args.budget:
            print(f"\nbatch {batch}: left out by --budget")
            continue
        turns = Turns(args.rounds, device, begin + args.budget)
        for number, group in enumerate(bench.decoding(batch)):
            makers = wanted(group, args.skip)
            if not makers:
                continue
            if batch > 1:
                bench.forget()
            turns.add(makers, bench.needed(batch, list(makers)))
            found = decode_result(bench, batch, turns.rates, turns.notes, bandwidth)
            result["batches"][str(batch)] = found
            _store(args, result, device)
            if batch == 1 and number == 0:
                result["prefill"] = bench.prefill(args.rounds, begin + args.budget, args.skip)
                _store(args, result, device)
        print(table(f"Decode, batch {batch}", result["batches"][str(batch)]), flush=True)
        if batch == 1:
            print(table(f"Prefill of {context - 1} tokens", result["prefill"]), flush=True)
        del turns
        cuda.release(device)
    return 0


def _store(args: argparse.Namespace, result: dict[str, Any], device: torch.device) -> None:
    if args.save:
        suffix = "" if args.backend == "auto" else f"_{args.backend}"
        save(f"decode_7b_{device.type}{suffix}", result, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; `--save` writes results/decode_7b_<device>.json, with `_<backend>` where
    one is asked for. The exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.arguments(parser)
    parser.add_argument("--model", default="llama-7b", help="sizes of a LLaMA by name")
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--backend", default="auto", help="of the engine's operators")
    args = parser.parse_args(argv)
    cells.check_arguments(args)
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    with use_backend(args.backend):
        try:
            return run_all(args, device)
        except DeviceLost as error:
            sys.stderr.write(f"the device is lost: {error}\n")
            return 1


if __name__ == "__main__":
    sys.exit(main())
