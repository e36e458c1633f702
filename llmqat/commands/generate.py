"""``llmqat generate``: text from a packed, prepared or plain model folder, with the quantized KV
cache.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from llmqat.errors import ConfigError
from llmqat.models.families import find_family
from llmqat.runtime.loading import (
    check_model_folder,
    load_model,
    load_tokenizer,
    parse_device,
    parse_dtype,
    set_threads,
    stop_ids,
)
from llmqat.runtime.sampling import Sampling
from llmqat.runtime.support import attention_window, has_engine
from llmqat.runtime.token_engine import TokenEngine
from llmqat.runtime.transformers_engine import open_engine

MIB = 2**20


@dataclass
class GenerateArguments:
    """Options of ``llmqat generate``."""

    model: str = field(metadata={"help": "Folder of a packed, prepared or plain model."})
    prompt: str = field(metadata={"help": "Text to continue."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens to add at most."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits."})
    top_k: int = field(default=0, metadata={"help": "0 samples from the full softmax."})
    greedy: bool = field(default=False, metadata={"help": "Always take the most likely token."})
    seed: int = field(default=0, metadata={"help": "Decides every random number."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of activations; auto: float32 on the CPU, the stored type on CUDA."
        },
    )
    kv_bits: int | None = field(
        default=None, metadata={"help": "KV cache of 4, 8 or 16 bits; the model's own otherwise."}
    )
    kv_mode: str | None = field(
        default=None, metadata={"help": "paper or serving; the model's own otherwise."}
    )
    head_bits: int = field(
        default=16, metadata={"help": "16 is exact; 8 quantizes the head too: faster, approximate."}
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
    json: bool = field(
        default=False, metadata={"help": "Print one JSON object instead of streaming the text."}
    )


ARGUMENTS = (GenerateArguments,)


class _Clock:
    """Times of the tokens as they are chosen, and the stream to the terminal."""

    def __init__(self, streamer: Any = None) -> None:
        self.times: list[float] = []
        self.streamer = streamer

    def __call__(self, record: int, token: int) -> None:
        self.times.append(time.perf_counter())
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))


def run(arguments: GenerateArguments) -> None:
    """Continue the prompt; the text goes to stdout, figures to stderr (or everything as JSON to
    stdout).
    """
    a = arguments
    sampling = Sampling(a.seed, a.temperature, a.top_k, a.greedy)
    if a.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {a.max_new_tokens} must be at least 1")
    device = parse_device(a.device)
    auto = torch.float32 if device.type == "cpu" else None
    dtype = auto if a.dtype == "auto" else parse_dtype(a.dtype)
    set_threads(a.threads)
    check_model_folder(a.model)
    tokenizer = load_tokenizer(a.model)
    prompt: list[int] = tokenizer(a.prompt)["input_ids"]
    if not prompt:
        raise ConfigError("prompt: is empty and the tokenizer adds no token; give some text")
    model = load_model(a.model, dtype=dtype, device=device)
    stops, max_len = stop_ids(model), _max_len(model, len(prompt), a.max_new_tokens)
    engine = open_engine(
        model,
        max_slots=1,
        max_len=max_len,
        kv_bits=a.kv_bits,
        kv_mode=a.kv_mode,
        head_bits=a.head_bits,
        graphs=None if a.graphs else False,
    )
    del model  # the engine holds the weights in its own layout

    clock = _Clock(None if a.json else _streamer(tokenizer, prompt))
    begin = time.perf_counter()
    (done,) = engine.generate([prompt], a.max_new_tokens, sampling, stop_ids=stops, on_token=clock)
    if clock.streamer is not None:
        clock.streamer.end()
    result = {"model": a.model, "prompt": a.prompt, "text": tokenizer.decode(done.new_tokens)}
    result |= _figures(engine, clock.times, begin, len(prompt)) | {
        "finish_reason": done.finish_reason
    }
    if done.finish_reason == "error":
        print("llmqat generate: stopped, the logits hold NaN or infinite values", file=sys.stderr)
    if a.json:
        print(json.dumps(result))
    else:
        print(describe(result), file=sys.stderr)


def _max_len(model: Any, prompt: int, new: int) -> int:
    """Tokens of the prompt and the text; says so where the model's positions end it earlier.

    Raises:
        ConfigError: the prompt leaves no room, or both are longer than a window of the engine's.
    """
    positions = model.config.max_position_embeddings
    window = attention_window(model) if has_engine(find_family(model)) else None
    name, room = f"{positions} positions", positions
    if window is not None and window < positions:
        name, room = f"sliding window of {window} tokens", window
    if prompt >= room:
        raise ConfigError(f"prompt: its {prompt} tokens fill the model's {name}; shorten it")
    if prompt + new > room and room < positions:
        raise ConfigError(
            f"--max-new-tokens: {new} after a prompt of {prompt} tokens is more than the model's"
            f" {name}, which the engine cannot leave; use at most {room - prompt}"
        )
    if prompt + new > room:
        print(
            f"llmqat generate: --max-new-tokens: {new} is more than the model's {name}"
            f" leave; at most {room - prompt} tokens are added",
            file=sys.stderr,
        )
    return min(prompt + new, room)


def _streamer(tokenizer: Any, prompt: list[int]) -> Any:
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer)
    streamer.put(torch.tensor(prompt))
    return streamer


def _figures(
    engine: TokenEngine, times: list[float], begin: float, prompt_tokens: int
) -> dict[str, Any]:
    """Speed and memory. The decode speed leaves out the prefill, which ends with the first
    token.
    """
    seconds = times[-1] - times[0] if len(times) > 1 else 0.0
    weights = engine.weight_bytes
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(times),
        "prefill_seconds": times[0] - begin if times else 0.0,
        "decode_seconds": seconds,
        "tokens_per_second": (len(times) - 1) / seconds if seconds > 0 else 0.0,
        "threads": torch.get_num_threads(),
        "kv_bits": engine.kv_bits,
        "kv_mode": engine.kv_mode,
        "weight_bytes": weights | {"total": sum(weights.values())},
        "cache_bytes": engine.cache_bytes,
        "cache_bytes_per_token": engine.cache_bytes / engine.max_len,
        "backends": sorted(set(engine.backends().values())),
    }


def describe(result: dict[str, Any]) -> str:
    """The figures as two lines."""
    weights = result["weight_bytes"]
    sizes = ", ".join(f"{name} {weights[name] / MIB:.1f}" for name in weights if name != "total")
    mode = "" if result["kv_bits"] == 16 else f" {result['kv_mode']}"
    if mode and "transformers" in result["backends"]:
        mode += " values, held as floats,"
    return (
        f"{result['new_tokens']} tokens at {result['tokens_per_second']:.1f} tok/s"
        f" ({result['threads']} threads; {result['prompt_tokens']} prompt tokens in"
        f" {result['prefill_seconds'] * 1e3:.0f} ms; backend {'+'.join(result['backends'])})\n"
        f"weights {weights['total'] / MIB:.1f} MiB ({sizes}); KV cache {result['kv_bits']}-bit"
        f"{mode} {result['cache_bytes'] / MIB:.2f} MiB,"
        f" {result['cache_bytes_per_token']:.0f} bytes a token"
    )
