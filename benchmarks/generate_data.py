"""Data generation: `llmqat generate-data`'s batched slots against transformers' batch-1 loop,
interleaved.

    python -m benchmarks.generate_data [--threads 2] [--max-len 96] [--rounds 3] [--save]
    python -m benchmarks.generate_data --device cuda [--shape llama-7b] [--save] [--budget 60]

Same teacher (fp32 on a CPU, bf16 on a GPU), same recipe (hybrid, full softmax), records of the same
length. The baseline is what the paper's script does: one `generate` call a record, batch 1, with
transformers' own sampling. Rates count chosen tokens over the wall time of everything a user waits
for, planning and storing included. On a GPU the teacher has random weights at LLaMA-7B's sizes, and
the baseline's record ends after 160 tokens: its rate is set by launches, not by the length.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from benchmarks.cells import check_alive
from benchmarks.entry import reason_of
from benchmarks.random_model import config_of, float_model
from benchmarks.timing import require_device, save, summary
from llmqat import Engine, from_pretrained
from llmqat.data.generate import Recipe, fill, run_config, usable_first_tokens
from llmqat.data.store import RecordWriter
from llmqat.demo.assets import smollm2
from llmqat.runtime.loading import load_tokenizer

Candidate = Callable[[], float]
BASELINE = "transformers, batch 1"
BASELINE_LEN = 160
"""Tokens of the baseline's record on a GPU: a fifth of a minute, not of the whole budget."""


def batched_candidate(engine: Engine, recipe: Recipe, first_tokens: Sequence[int]) -> Candidate:
    """As many records as there are slots, into a fresh folder; end-of-text does not end a
    record.
    """

    def run() -> float:
        config = run_config(recipe, engine, first_tokens, ())
        with (
            tempfile.TemporaryDirectory() as folder,
            RecordWriter(folder, config, records=engine.max_slots) as writer,
        ):
            return fill(writer, engine, recipe, first_tokens, progress=False).tokens_per_second

    return run


def transformers_candidate(model: nn.Module, recipe: Recipe, token: int) -> Candidate:
    """One record: four greedy tokens, then sampled from the full softmax, batch 1."""
    ids = torch.tensor([[token]], device=model.device)

    def run() -> float:
        new = recipe.max_len - 1
        begin = time.perf_counter()
        prefix = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
        whole = model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            max_new_tokens=new - 4,
            min_new_tokens=new - 4,
            do_sample=True,
            top_k=0,
        )
        whole[0, -1].item()  # on a GPU: until it is there
        return new / (time.perf_counter() - begin)

    return run


def teacher(args: argparse.Namespace, device: torch.device) -> tuple[str, nn.Module, Any]:
    """Name, model and tokenizer: a folder's, or random weights of a released size (None)."""
    if args.shape is not None:
        return args.shape, float_model(config_of(args.shape), device), None
    folder = Path(args.model) if args.model else smollm2(args.cache)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = from_pretrained(folder, dtype=dtype, device=device)
    return folder.name, model, load_tokenizer(folder)


def engine_makers(
    model: nn.Module, slots: Sequence[int], max_len: int, device: torch.device
) -> dict[str, Callable[[], Engine]]:
    """Engines by name; on a GPU also with a quantized cache, which is approximate."""

    def make(count: int, kv_bits: int) -> Callable[[], Engine]:
        return lambda: Engine(model, max_slots=count, max_len=max_len, kv_bits=kv_bits)

    found = {f"llmqat, {count} slots": make(count, 16) for count in slots}
    if device.type == "cuda":
        found[f"llmqat, {slots[-1]} slots, KV8 (approximate)"] = make(slots[-1], 8)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--save` writes results/generate_data.json (on a GPU
    generate_data_cuda.json).
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="a plain LLaMA folder; SmolLM2-135M by default")
    parser.add_argument("--shape", help="random bf16 weights of these sizes instead (llama-7b)")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--slots", type=int, nargs="+", help="64 and 128; on a GPU 64")
    parser.add_argument("--max-len", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--quick", action="store_true", help="few slots and tokens, one round")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    gpu = device.type == "cuda"
    if gpu and args.model is None and args.shape is None:
        args.shape = "llama-7b"
    slots = [4] if args.quick else args.slots or ([64] if gpu else [64, 128])
    max_len = args.max_len or (32 if args.quick else 512 if gpu else 96)
    rounds = args.rounds or (1 if args.quick else 2 if gpu else 3)

    begin = time.monotonic()
    name, model, tokenizer = teacher(args, device)
    first_tokens = usable_first_tokens(model.config.vocab_size, tokenizer)
    token = first_tokens[len(first_tokens) // 2]
    alone = min(max_len, BASELINE_LEN) if gpu else max_len
    candidates = {BASELINE: transformers_candidate(model, Recipe(max_len=alone), token)}
    # The first call of generate builds its processors.
    transformers_candidate(model, Recipe(max_len=min(max_len, 16)), token)()
    recipe = Recipe(max_len=max_len)
    caches: dict[str, int] = {}
    notes: dict[str, str] = {}
    for label, make in engine_makers(model, slots, max_len, device).items():
        try:
            engine = make()
            candidate = batched_candidate(engine, recipe, first_tokens)
            if gpu:  # kernels are compiled and graphs captured before the first round
                warm = Recipe(max_len=min(max_len, 16))
                batched_candidate(engine, warm, first_tokens)()
        except Exception as error:  # memory, a kernel: the others go on
            notes[label] = f"left out: {reason_of(error)}"
            check_alive(device, label, notes[label])
            continue
        candidates[label], caches[label] = candidate, engine.cache_bytes
    rates: dict[str, list[float]] = {label: [] for label in candidates}
    for index in range(rounds):
        if index and time.monotonic() - begin > args.budget:
            break
        for label, run in candidates.items():
            rates[label].append(run())
        result = result_of(name, model, max_len, rates, caches, notes)
        if args.save:
            save("generate_data_cuda" if gpu else "generate_data", result, device)
    print(table(result, args.threads))


def result_of(
    name: str, model: nn.Module, max_len: int, rates: dict[str, list[float]],
    caches: dict[str, int], notes: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What is stored."""
    figures = {label: summary(values) for label, values in rates.items()}
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_len": max_len,
        "tokens_per_second": figures,
        "ratio_to_baseline": {
            label: figures[label]["p50"] / figures[BASELINE]["p50"] for label in caches
        },
        "cache_bytes": caches,
        "notes": notes,
    }


def table(result: dict[str, Any], threads: int) -> str:
    """The result as markdown."""
    lines = [
        f"{result['dtype']} teacher {result['model']}, {threads} threads, records of"
        f" {result['max_len']} tokens\n",
        f"| candidate | tok/s (p20-p80) | over {BASELINE} |\n|---|---|---|",
    ]
    for label, figure in result["tokens_per_second"].items():
        ratio = result["ratio_to_baseline"].get(label)
        shown = "" if ratio is None else f"{ratio:.1f}x"
        spread = f"{figure['p20']:.1f}-{figure['p80']:.1f}"
        lines.append(f"| {label} | {figure['p50']:.1f} ({spread}) | {shown} |")
    return "\n".join(
        [*lines, *(f"| {label} | {note} | |" for label, note in result["notes"].items())]
    )


if __name__ == "__main__":
    main()
