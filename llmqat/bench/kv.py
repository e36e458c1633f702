"""What KV bits are worth: memory and decode speed by sequence length and width (paper.md 1.10).

Memory is computed from the sizes of the model (:mod:`llmqat.eval.cost`) and, where the machine has
room, measured: the bytes of the engine's real cache. Speed is measured there too, one token after
`seq_len` - 1 others. The cache is not written by a prefill, which would take hours at long lengths,
but filled with random codes and equal scales: how long a token takes depends on the lengths alone.
Lengths that the engine, the model or the memory does not allow are computed only, and say so.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

import llmqat_kernels
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.eval.cost import GIB, ModelShape, kv_bytes_per_token
from llmqat.runtime.engine import Engine
from llmqat.runtime.support import attention_window
from llmqat_kernels import KVCache

__all__ = ["KVRow", "computed_rows", "fill", "free_memory", "measure", "parse_lengths"]

WIDTHS = (16, 8, 4)
WARMUP = 2
MEMORY_SHARE = 0.8
"""The part of the free memory that a cache may take."""


@dataclass(frozen=True)
class KVRow:
    """One width at one length; None where it was not measured, and why in `note`.

    Attributes:
        bits: 16, 8 or 4. seq_len: tokens of each sequence.
        computed_bytes, measured_bytes: of the whole cache, codes and scales, all sequences.
        tokens_per_second: of all sequences together, from the median step.
        milliseconds: (20th, 50th, 80th percentile) of one decode step.
    """

    bits: int
    seq_len: int
    computed_bytes: int
    measured_bytes: int | None = None
    tokens_per_second: float | None = None
    milliseconds: tuple[float, float, float] | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and GiB; for JSON."""
        return {**asdict(self), "computed_gib": self.computed_bytes / GIB}


def parse_lengths(text: str) -> list[int]:
    """`1k,2k,512` -> [1024, 2048, 512]; k is 1024.

    Raises:
        ConfigError: anything else.
    """
    lengths = []
    for part in text.split(","):
        number = part.strip().lower()
        factor = 1024 if number.endswith("k") else 1
        digits = number.removesuffix("k")
        if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
            raise ConfigError(f"--seq-lens: {part.strip()!r} is not a length; write e.g. 1k,2k,512")
        lengths.append(int(digits) * factor)
    return lengths


def computed_rows(
    shape: ModelShape, lengths: list[int], widths: list[int], *, kv_mode: str, batch: int, note: str
) -> list[KVRow]:
    """The memory of every width at every length, and `note` why nothing is measured."""
    return [
        KVRow(bits, length, _computed(shape, bits, kv_mode) * length * batch, note=note)
        for bits in widths
        for length in lengths
    ]


def _computed(shape: ModelShape, bits: int, kv_mode: str) -> int:
    return kv_bytes_per_token(shape, QATConfig(16, 16, bits, kv_mode=kv_mode)).total


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: what the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fill(caches: list[KVCache], seed: int = 0) -> None:
    """Write random codes with scale 1 / qmax (or standard normal floats) into every layer.

    All layers get the same ones: no result depends on them here.
    """
    first = caches[0]
    generator = torch.Generator(first.k_codes.device).manual_seed(seed)
    for name in ("k", "v"):
        codes, scale = getattr(first, f"{name}_codes"), getattr(first, f"{name}_scale")
        _random_codes(codes, first.bits, generator)
        if first.bits != 16:
            scale.fill_(1 / (2 ** (first.bits - 1) - 1))
        for cache in caches[1:]:
            getattr(cache, f"{name}_codes").copy_(codes)
            getattr(cache, f"{name}_scale").copy_(scale)


def _random_codes(codes: Tensor, bits: int, generator: torch.Generator) -> None:
    """In place; -2^(bits-1) never occurs (spec 1), in a packed byte neither."""
    if bits == 16:
        codes.normal_(generator=generator)
    elif bits == 8:
        codes.random_(-127, 128, generator=generator)
    else:
        low, high = (torch.empty_like(codes).random_(1, 16, generator=generator) for _ in range(2))
        torch.bitwise_or((low ^ 8), (high ^ 8) << 4, out=codes)  # 1..15 less 8, two's complement


@torch.inference_mode()
def measure(
    model: nn.Module,
    lengths: list[int],
    widths: list[int],
    *,
    kv_mode: str,
    batch: int = 1,
    steps: int = 8,
) -> tuple[list[KVRow], dict[str, Any]]:
    """Memory and decode speed of `model` in its dtype; its weights are moved into the engine.

    Args:
        model: plain, prepared or converted; in bfloat16 or float16, so that 16 bits are 16.
        lengths: tokens per sequence. widths: of 16, 8 and 4.
        kv_mode: `paper` or `serving`. batch: sequences at one time. steps: timed tokens.

    Returns:
        the rows, width by width, and what the engine is: `weight_bytes`, `backends`.

    Raises:
        ConfigError: a model that the engine does not run.
    """
    shape, (limit, what) = ModelShape.from_config(model.config), _longest(model)
    possible = [length for length in lengths if length <= limit]
    engine = Engine(
        model,
        max_slots=batch,
        max_len=max(possible, default=1),
        kv_bits=16,
        kv_mode=kv_mode,
        graphs=False,  # no slot for padding
    )
    engine.replace_cache(max_len=1)
    rows = []
    for bits in widths:
        for length in lengths:
            computed = _computed(shape, bits, kv_mode) * length * batch
            free = free_memory(engine.device)
            if length > limit:
                note = f"computed only: {what}"
            elif computed > MEMORY_SHARE * free:
                note = f"computed only: {computed / GIB:.1f} GiB of {free / GIB:.1f} GiB free"
            else:
                rows.append(_measured(engine, bits, length, kv_mode, steps, computed))
                continue
            rows.append(KVRow(bits, length, computed, note=note))
    return rows, {"weight_bytes": engine.weight_bytes, "backends": engine.backends()}


def _longest(model: nn.Module) -> tuple[int, str]:
    """Tokens of the longest sequence that the engine runs, and what sets the limit."""
    window = attention_window(model)
    positions = int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    if window is None or positions <= window:
        return positions, f"the model has {positions} positions"
    return window, f"the engine has no windows, and the model's sliding window is {window} tokens"


def _measured(
    engine: Engine, bits: int, length: int, kv_mode: str, steps: int, computed: int
) -> KVRow:
    try:
        engine.replace_cache(max_len=length, kv_bits=bits, kv_mode=kv_mode)
    except ConfigError as error:  # a width that this family's cache cannot have
        return KVRow(bits, length, computed, note=f"computed only: {error}")
    fill(engine.caches)
    slots, batch = list(range(engine.max_slots)), engine.max_slots
    times = []
    for step in range(WARMUP + steps):
        for slot in slots:
            engine.assume_length(slot, length - 1)
        _wait(engine.device)
        begin = time.perf_counter()
        engine.decode([step % engine.vocab_size] * batch, slots)
        _wait(engine.device)
        times.append(time.perf_counter() - begin)
    held = engine.cache_bytes
    engine.replace_cache(max_len=1)
    fifths = quantiles(times[WARMUP:], n=10, method="inclusive")
    low, median, high = (1000 * fifths[index] for index in (1, 4, 7))
    return KVRow(bits, length, computed, held, 1000 * batch / median, (low, median, high))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, Any]:
    """What the speed depends on besides the model."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "llmqat_kernels": llmqat_kernels.__version__,
    }
