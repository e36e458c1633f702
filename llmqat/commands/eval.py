"""`llmqat eval`: token perplexity of a full-precision, fake-quantized or packed model."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from llmqat.config import QATConfig
from llmqat.convert import prepare, state_of
from llmqat.errors import ConfigError
from llmqat.eval.perplexity import encode_text_file, perplexity
from llmqat.runtime.loading import (
    load_model,
    load_tokenizer,
    parse_device,
    parse_dtype,
    set_threads,
)
from llmqat.train.arguments import QuantArguments, check_number
from llmqat.train.run import announce_backend

OFF = "16-16-16"


@dataclass
class EvalArguments:
    """What is measured, and on what."""

    model: str = field(
        metadata={
            "help": "Folder of a full-precision, prepared or packed model with its tokenizer."
        }
    )
    text: str = field(metadata={"help": "UTF-8 text file."})
    seq_len: int = field(default=2048, metadata={"help": "Tokens per window."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Use only the first tokens of the text."}
    )
    batch_size: int = field(
        default=1, metadata={"help": "Windows per forward pass; changes speed only."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Type of all that is not quantized."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; torch's default otherwise."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object on stdout."})

    def __post_init__(self) -> None:
        check_number("seq-len", self.seq_len, 2)
        check_number("batch-size", self.batch_size, 1)
        if self.max_tokens is not None:
            check_number("max-tokens", self.max_tokens, 1)


ARGUMENTS = (EvalArguments, QuantArguments)


def evaluate(arguments: EvalArguments, config: QATConfig | None) -> dict[str, Any]:
    """Perplexity and everything needed to read it, as JSON values.

    Args:
        config: fake-quantizes a full-precision model (round to nearest); a prepared or packed one
            must have the same setting, or None to take it as it is.

    Raises:
        ConfigError: `config` contradicts the checkpoint.
        CheckpointError, DataError, InvalidArgument: unreadable model or text, or a window that does
            not fit.
    """
    device = parse_device(arguments.device)
    set_threads(arguments.threads)
    model = load_model(arguments.model, dtype=parse_dtype(arguments.dtype), device=device)
    state = state_of(model)
    if config is not None and state is None:
        prepare(model, config)
    elif config is not None and state is not None and config != state.config:
        raise ConfigError(
            f"--bits: {arguments.model} is {state.stage} as {state.config.setting}"
            f" ({state.config.kv_mode}), with other settings; leave the quantization options out"
        )
    used = state_of(model)
    announce_backend(device)
    ids = encode_text_file(load_tokenizer(arguments.model), arguments.text)
    started = time.perf_counter()
    result = perplexity(
        model,
        ids,
        arguments.seq_len,
        max_tokens=arguments.max_tokens,
        batch_size=arguments.batch_size,
    )
    seconds = time.perf_counter() - started
    return {
        "model": arguments.model,
        "text": arguments.text,
        "setting": used.config.setting if used is not None else OFF,
        "kv_mode": used.config.kv_mode if used is not None else None,
        "stage": state.stage
        if state is not None
        else ("full_precision" if config is None else "rtn"),
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "nll": result.nll,
        "tokens": result.tokens,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "dtype": arguments.dtype,
        "device": device.type,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(result.tokens / seconds, 1),
    }


def run(arguments: EvalArguments, quantization: QuantArguments) -> None:
    """Print the result: a line for people, or one JSON object."""
    result = evaluate(arguments, quantization.to_config())
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
        return
    print(
        f"perplexity {math.exp(min(result['nll'], 700)):.4f}  setting {result['setting']}"
        f"  ({result['stage']}, {result['tokens']} tokens in windows of {result['seq_len']},"
        f" {result['seconds']:.1f} s)"
    )
