"""Data generation: `llmqat generate-data`'s batched slots against transformers' batch-1 loop,
interleaved.

    python -m benchmarks.generate_data [--threads 2] [--max-len 96] [--rounds 3] [--save]

Same teacher in fp32, same recipe (hybrid, full softmax), records of the same length. The baseline
is what the paper's script does: one `generate` call a record, batch 1, with transformers' own
sampling. Rates count chosen tokens over the wall time of everything a user waits for, planning and
storing included.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from benchmarks.timing import save, summary
from llmqat import Engine, from_pretrained
from llmqat.data.generate import Recipe, fill, run_config, usable_first_tokens
from llmqat.data.store import RecordWriter
from llmqat.demo.assets import smollm2
from llmqat.runtime.loading import load_tokenizer

Candidate = Callable[[], float]


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
    ids = torch.tensor([[token]])

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
        model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            max_new_tokens=new - 4,
            min_new_tokens=new - 4,
            do_sample=True,
            top_k=0,
        )
        return new / (time.perf_counter() - begin)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--save` writes results/generate_data.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a plain LLaMA folder; SmolLM2-135M by default")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--max-len", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    folder = Path(args.model) if args.model else smollm2(args.cache)
    model = from_pretrained(folder, dtype=torch.float32)
    recipe = Recipe(max_len=args.max_len)
    engines = {
        f"llmqat, {slots} slots": Engine(model, max_slots=slots, max_len=args.max_len)
        for slots in args.slots
    }
    vocab = next(iter(engines.values())).vocab_size
    first_tokens = usable_first_tokens(vocab, load_tokenizer(folder))
    candidates = {
        name: batched_candidate(engine, recipe, first_tokens) for name, engine in engines.items()
    }
    baseline = "transformers, batch 1"
    candidates[baseline] = transformers_candidate(
        model, recipe, first_tokens[len(first_tokens) // 2]
    )
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    candidates[baseline]()  # the first call of generate builds its processors
    for _ in range(args.rounds):
        for name, run in candidates.items():
            rates[name].append(run())
    figures = {name: summary(values) for name, values in rates.items()}
    result: dict[str, Any] = {
        "model": folder.name,
        "dtype": "float32",
        "max_len": args.max_len,
        "tokens_per_second": figures,
        "ratio_to_baseline": {
            name: figures[name]["p50"] / figures[baseline]["p50"] for name in engines
        },
        "cache_bytes": {name: engine.cache_bytes for name, engine in engines.items()},
    }
    print(f"fp32 teacher {folder.name}, {args.threads} threads, records of {args.max_len} tokens\n")
    print(f"| candidate | tok/s (p20-p80) | over {baseline} |\n|---|---|---|")
    for name, figure in figures.items():
        ratio = result["ratio_to_baseline"].get(name)
        shown = "" if ratio is None else f"{ratio:.1f}x"
        print(
            f"| {name} | {figure['p50']:.1f} ({figure['p20']:.1f}-{figure['p80']:.1f}) | {shown} |"
        )
    if args.save:
        print(f"\n{save('generate_data', result)}")


if __name__ == "__main__":
    main()
