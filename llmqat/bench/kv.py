"""What KV bits are worth: memory and decode speed by sequence length and width (paper.md 1.10).

Memory is computed from the sizes of the model (:mod:`llmqat.eval.cost`) and, where the machine has
room, measured: the bytes of the real cache. Speed is measured there too, one token after
`seq_len` - 1 others (:mod:`llmqat.bench.subjects`). Lengths that the engine, the model or the
memory does not allow are computed only, and say so.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import nn

import llmqat_kernels
from llmqat.bench.subjects import EngineSubject, Subject, TransformersSubject
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.eval.cost import GIB, ModelShape, kv_bytes_per_token
from llmqat.models.families import find_family
from llmqat.runtime.support import has_engine

__all__ = ["KVRow", "computed_rows", "free_memory", "measure", "parse_lengths"]

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

    A family that the engine does not run is measured with floats, in transformers.

    Args:
        model: plain, prepared or converted; in bfloat16 or float16, so that 16 bits are 16.
        lengths: tokens per sequence. widths: of 16, 8 and 4.
        kv_mode: `paper` or `serving`. batch: sequences at one time. steps: timed tokens.

    Returns:
        the rows, width by width, and what runs them: `weight_bytes`, `backends`.

    Raises:
        ConfigError: a model of no supported family.
    """
    subject: Subject
    if has_engine(find_family(model)):
        subject = EngineSubject(model, lengths, kv_mode=kv_mode, batch=batch)
    else:
        subject = TransformersSubject(model, batch=batch)
    shape = ModelShape.from_config(model.config)
    rows = []
    for bits in widths:
        for length in lengths:
            computed = _computed(shape, bits, kv_mode) * length * batch
            rows.append(_measured(subject, bits, length, steps, computed))
    return rows, subject.describe()


def _measured(subject: Subject, bits: int, length: int, steps: int, computed: int) -> KVRow:
    free = free_memory(subject.device)
    try:
        if length > subject.limit:
            raise ConfigError(subject.limited_by)
        if computed > MEMORY_SHARE * free:
            raise ConfigError(f"{computed / GIB:.1f} GiB of {free / GIB:.1f} GiB free")
        step = subject.fill(bits, length)
    except ConfigError as error:
        return KVRow(bits, length, computed, note=f"computed only: {error}")
    times = []
    for number in range(WARMUP + steps):
        _wait(subject.device)
        begin = time.perf_counter()
        step(number)
        _wait(subject.device)
        times.append(time.perf_counter() - begin)
    held = subject.cache_bytes
    subject.empty()
    fifths = quantiles(times[WARMUP:], n=10, method="inclusive")
    low, median, high = (1000 * fifths[index] for index in (1, 4, 7))
    return KVRow(bits, length, computed, held, 1000 * subject.batch / median, (low, median, high))


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
