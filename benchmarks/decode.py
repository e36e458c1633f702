"""Decode speed at batch 1: the packed model in the engine against transformers and llama.cpp,
interleaved.

    python -m benchmarks.decode [--threads 1] [--tokens 96] [--rounds 5] [--save]

Every candidate continues the same prompt greedily by the same number of tokens; a rate leaves out
the prefill (it counts from the first new token to the last). The packed checkpoint holds embedding,
norms and head in bf16, and the engine computes in fp32. llama.cpp joins in where `llama_cpp` is
installed: it reads the 4-bit file (Q4_1) that the demonstration's model comes from (its threads are
its own, so compare it by the wall clock on a quiet machine). ``--setting 4-16-16`` compares codes
that stay codes with weights dequantized when the model is loaded.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from benchmarks.timing import environment, save, summary
from llmqat import Engine, QATConfig, convert, from_pretrained
from llmqat.demo.assets import SMOLLM2, locate, smollm2
from llmqat.runtime import weights
from llmqat.runtime.loading import load_tokenizer

PROMPT = "The history of science is"
SETTINGS = (
    ("4-8-8", "paper", 16),
    ("4-8-8", "serving", 16),
    ("4-8-4", "serving", 16),
    ("4-8-8", "paper", 8),
)
"""W-A-KV, KV mode, bits of the head. The last is for llama.cpp, whose file has an 8-bit head."""
MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Candidate = Callable[[], float]
Clock = Callable[[], float]


def rate(times: Sequence[float]) -> float:
    """Tokens a second from the times at which tokens were chosen."""
    return (len(times) - 1) / (times[-1] - times[0])


def packed_engine(
    model: nn.Module, setting: str, mode: str, head_bits: int, max_len: int
) -> Engine:
    """The engine on a round-to-nearest packed copy, as `export --dtype bfloat16` would store it."""
    packed = convert(copy.deepcopy(model), QATConfig.parse(setting, kv_mode=mode))
    for parameter in packed.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return Engine(packed, max_len=max_len, head_bits=head_bits)


def engines(plain: nn.Module, setting: str | None, max_len: int) -> Iterator[tuple[str, Engine]]:
    """The engines to compare, by name."""
    if setting is None:
        for bits, mode, head in SETTINGS:
            engine = packed_engine(plain, bits, mode, head, max_len)
            yield f"llmqat {bits} {mode}, {head}-bit head", engine
        return
    yield f"llmqat {setting}", packed_engine(plain, setting, "paper", 16, max_len)
    if QATConfig.parse(setting).a_bits == 16:
        with mock.patch.object(weights, "multiplies_codes", lambda *_: False):
            floats = packed_engine(plain, setting, "paper", 16, max_len)
        yield f"llmqat {setting}, dequantized when loaded", floats


def engine_candidate(engine: Engine, prompt: list[int], tokens: int, clock: Clock) -> Candidate:
    """One greedy continuation in the engine."""

    def run() -> float:
        times: list[float] = []
        engine.generate([prompt], tokens, on_token=lambda *_: times.append(clock()))
        return rate(times)

    return run


class _Times:
    """A streamer of transformers that only looks at the clock; the first call brings the prompt."""

    def __init__(self, clock: Clock) -> None:
        self.times: list[float] = []
        self.clock = clock

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        """Nothing to flush."""


def transformers_candidate(
    model: nn.Module, prompt: list[int], tokens: int, clock: Clock
) -> Candidate:
    """One greedy continuation by `generate` with its default cache."""
    ids = torch.tensor([prompt])

    def run() -> float:
        seen = _Times(clock)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=seen,
        )
        return rate(seen.times[1:])

    return run


def llama_cpp_candidate(
    prompt: list[int], tokens: int, threads: int, max_len: int, clock: Clock
) -> Candidate:
    """One greedy continuation by llama.cpp on the packaged Q4_1 file."""
    from llama_cpp import Llama

    model = Llama(
        str(locate(SMOLLM2)),
        n_ctx=max_len,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run() -> float:
        model.reset()
        times: list[float] = []
        for _ in model.generate(prompt, temp=0.0):
            times.append(clock())
            if len(times) == tokens:
                break
        return rate(times)

    return run


def measure(candidates: dict[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Rates of every candidate, one after the other in each round; the first round does not
    count.
    """
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, run in candidates.items():
            value = run()
            if index:
                rates[name].append(value)
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--save` writes results/decode.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a plain LLaMA folder; SmolLM2-135M by default")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=tuple(CLOCKS),
        help="cpu: processor seconds, for one thread on a machine that is not quiet",
    )
    parser.add_argument("--setting", help="W-A-KV in place of the usual ones")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu adds up the threads' seconds; use it with --threads 1")
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]

    folder = Path(args.model) if args.model else smollm2(args.cache)
    prompt = load_tokenizer(folder)(PROMPT)["input_ids"]
    max_len = len(prompt) + args.tokens
    plain = from_pretrained(folder, dtype=torch.float32)
    made = dict(engines(plain, args.setting, max_len))
    ours, first = next(iter(made.items()))
    candidates = {
        name: engine_candidate(engine, prompt, args.tokens, clock) for name, engine in made.items()
    }
    half = from_pretrained(folder, dtype=torch.bfloat16)
    candidates["transformers fp32"] = transformers_candidate(plain, prompt, args.tokens, clock)
    candidates["transformers bf16"] = transformers_candidate(half, prompt, args.tokens, clock)
    if args.model is None and find_spec("llama_cpp") is not None:
        candidates["llama.cpp Q4_1"] = llama_cpp_candidate(
            prompt, args.tokens, args.threads, max_len, clock
        )
    rates = measure(candidates, args.rounds)
    figures = {name: summary(values) for name, values in rates.items()}
    result: dict[str, Any] = {
        "model": folder.name,
        "clock": args.clock,
        "prompt_tokens": len(prompt),
        "new_tokens": args.tokens,
        "tokens_per_second": figures,
        "ratio_of": ours,
        "ratios": {
            name: figures[ours]["p50"] / figure["p50"]
            for name, figure in figures.items()
            if args.setting or name not in made
        },
        "weight_bytes": first.weight_bytes,
        "linear_bytes": {name: engine.weight_bytes["linears"] for name, engine in made.items()},
        "cache_bytes": {name: engine.cache_bytes for name, engine in made.items()},
        "backends": sorted(set(first.backends().values())),
    }
    print(table(result))
    if args.save:
        name = "decode" if args.setting is None else f"decode_{args.setting}"
        print(f"\n{save(name, result)}")


def table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    lines = [
        f"Decode of {result['new_tokens']} tokens, batch 1, {environment()['threads']} thread(s),"
        f" {result['model']}, {result['clock']} clock",
        "",
        f"| candidate | tok/s (p20-p80) | {result['ratio_of']} over it |",
        "|---|---|---|",
    ]
    for name, figure in result["tokens_per_second"].items():
        ratio = result["ratios"].get(name)
        shown = "" if ratio is None else f"{ratio:.2f}x"
        spread = f"{figure['p20']:.1f}-{figure['p80']:.1f}"
        lines.append(f"| {name} | {figure['p50']:.1f} ({spread}) | {shown} |")
    weights = result["weight_bytes"]
    sizes = ", ".join(f"{name} {size / MIB:.1f}" for name, size in weights.items())
    linears = ", ".join(f"{name} {n / MIB:.1f}" for name, n in result["linear_bytes"].items())
    lines += ["", f"Weights of {result['ratio_of']}, MiB: {sizes}.", f"Linears, MiB: {linears}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
