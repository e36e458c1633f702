"""``llmqat generate-data``: the teacher writes token records, batched over a KV cache, resumable
and shardable.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmqat import __version__
from llmqat.data.generate import Recipe, fill, run_config, usable_first_tokens
from llmqat.data.store import RecordWriter, parse_shard
from llmqat.data.teacher import teacher_digest
from llmqat.errors import ConfigError
from llmqat.runtime.loading import (
    check_model_folder,
    check_positions,
    has_tokenizer,
    load_model,
    load_tokenizer,
    parse_device,
    parse_dtype,
    set_threads,
    stop_ids,
)
from llmqat.runtime.token_engine import TokenEngine
from llmqat.runtime.transformers_engine import open_engine

MIB = 2**20


@dataclass
class GenerateDataArguments:
    """Options of ``llmqat generate-data``."""

    model: str = field(
        metadata={"help": "Teacher: a folder with a LLaMA, Mistral, Qwen2, Qwen3 or GPT-2 model."}
    )
    output: str = field(metadata={"help": "Folder of the records; a second run continues there."})
    num_records: int | None = field(
        default=None,
        metadata={
            "help": "Records of the whole dataset, over all shards; a larger number than last"
            " time adds to an unsharded folder."
        },
    )
    num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Instead of --num-records: records for this many tokens if none ends early."
        },
    )
    max_len: int = field(default=2048, metadata={"help": "Longest record, in tokens."})
    strategy: str = field(
        default="hybrid",
        metadata={"help": "hybrid (3-5 greedy tokens, then sampled), greedy or sampled."},
    )
    first_token: str = field(
        default="random", metadata={"help": "random, or enumerate: walk through the vocabulary."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of sampled tokens."}
    )
    top_k: int = field(
        default=0,
        metadata={"help": "0 samples from the full softmax; 50 is what the released code did."},
    )
    seed: int = field(
        default=0, metadata={"help": "With the record id it decides every random number."}
    )
    slots: int = field(
        default=64, metadata={"help": "Records written at one time; changes speed only."}
    )
    shard: str = field(
        default="0/1", metadata={"help": "i/n: write the i-th of n parts of the dataset."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the teacher; auto: float32 on the CPU, bfloat16 on CUDA."},
    )
    kv_bits: int = field(
        default=16,
        metadata={
            "help": "16 keeps keys and values as floats; 8 and 4 are approximate: another teacher."
        },
    )
    kv_mode: str = field(
        default="serving", metadata={"help": "Mode of a quantized KV cache: paper or serving."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; torch's default otherwise."}
    )
    graphs: bool = field(
        default=True,
        metadata={
            "help": "On CUDA, replay decode steps as graphs; --no-graphs launches each kernel."
        },
    )
    records_per_part: int = field(default=128, metadata={"help": "Records per parquet file."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object with the result."})


ARGUMENTS = (GenerateDataArguments,)


def run(arguments: GenerateDataArguments) -> None:
    """Write what is missing of this shard, then report."""
    a = arguments
    recipe = Recipe(a.strategy, a.first_token, a.max_len, a.temperature, a.top_k, a.seed)
    records = _records(a)
    parse_shard(a.shard)
    device = parse_device(a.device)
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = auto if a.dtype == "auto" else parse_dtype(a.dtype)
    set_threads(a.threads)
    if Path(a.output).exists() and not Path(a.output).is_dir():
        raise ConfigError(f"--output: {a.output} is a file; name a folder")
    check_model_folder(a.model)
    check_positions(a.model, "max-len", a.max_len)
    model = load_model(a.model, dtype=dtype, device=device)
    stops = stop_ids(model)
    tokenizer = load_tokenizer(a.model) if has_tokenizer(a.model) else None
    if tokenizer is None:
        _say(f"{a.model} has no tokenizer: only the stop tokens are kept from starting a record")
    engine = open_engine(
        model,
        max_slots=max(1, min(a.slots, records)),
        max_len=a.max_len,
        kv_bits=a.kv_bits,
        kv_mode=a.kv_mode,
        graphs=None if a.graphs else False,
    )
    del model  # the engine holds the weights in its own layout
    if "transformers" in engine.backends().values():
        _say("the engine has no code for this family: transformers' forward writes, slower")
    if engine.kv_bits < 16:
        _say(f"--kv-bits {engine.kv_bits}: approximate, not what the full-precision teacher writes")
    weights = sum(engine.weight_bytes.values())
    _say(
        f"{engine.max_slots} slots on {device}, weights {weights / MIB:.0f} MiB,"
        f" KV cache {engine.cache_bytes / MIB:.0f} MiB, backend {_backend(engine)}"
    )
    first_tokens = usable_first_tokens(engine.vocab_size, tokenizer, stops)
    config = {
        "teacher_sha256": teacher_digest(a.model),
        **run_config(recipe, engine, first_tokens, stops),
        "versions": {
            "llmqat": __version__,
            "torch": torch.__version__,
            "teacher": Path(a.model).resolve().name,
            "device": device.type,
            "backend": _backend(engine),
        },
    }
    with RecordWriter(
        a.output, config, records=records, shard=a.shard, records_per_part=a.records_per_part
    ) as writer:
        kept = writer.stored
        summary = fill(writer, engine, recipe, first_tokens, stop_ids=stops)
        result = {
            "output": a.output,
            "records": writer.stored,
            "tokens": writer.tokens,
            "new_records": summary.records,
            "kept_records": kept,
            "new_tokens": summary.tokens,
            "seconds": summary.seconds,
            "tokens_per_second": summary.tokens_per_second,
            "finish_reasons": summary.finish_reasons,
            "weight_bytes": weights,
            "cache_bytes": engine.cache_bytes,
        }
    if summary.errors:
        _say(f"{summary.errors} records ended on NaN or infinite logits (finish_reason error)")
    if a.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['records']} records, {result['tokens']} tokens in {a.output}"
            f" ({summary.records} new, {kept} kept; {summary.tokens_per_second:.1f} tok/s)"
        )


def _records(a: GenerateDataArguments) -> int:
    if (a.num_records is None) == (a.num_tokens is None):
        raise ConfigError(
            "num_records, num_tokens: give exactly one of --num-records and --num-tokens"
        )
    if a.slots < 1:
        raise ConfigError(f"slots: {a.slots} must be at least 1")
    name, count = (
        ("num_records", a.num_records) if a.num_tokens is None else ("num_tokens", a.num_tokens)
    )
    if count is None or count < 1:
        raise ConfigError(f"{name}: {count} must be at least 1")
    return count if a.num_tokens is None else -(-count // a.max_len)


def _backend(engine: TokenEngine) -> str:
    return "+".join(sorted(set(engine.backends().values())))


def _say(message: str) -> None:
    print(f"llmqat generate-data: {message}", file=sys.stderr)
