"""``llmqat export``: a prepared (trained) model as a packed checkpoint; a plain one by
round-to-nearest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmqat.checkpoint import save_pretrained, verify_export
from llmqat.checkpoint.inspection import inspect
from llmqat.checkpoint.released import import_released
from llmqat.checkpoint.save import check_replaceable
from llmqat.config import QATConfig
from llmqat.convert import convert
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_linears
from llmqat.runtime.loading import has_tokenizer, load_model, parse_device, parse_dtype
from llmqat.state import PACKED, state_of

BYTES_PER_BF16 = 2
MIB = 2**20


@dataclass
class ExportArguments:
    """Options of ``llmqat export``."""

    model: str = field(
        metadata={"help": "Folder of a prepared model, or of a plain one with --bits."}
    )
    output: str = field(metadata={"help": "Folder of the packed checkpoint."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of embeddings, norms and head, e.g. bfloat16; the model's otherwise."
        },
    )
    bits: str | None = field(
        default=None,
        metadata={"help": "W-A-KV such as 4-8-8: round a plain model to nearest, untrained."},
    )
    kv_mode: str | None = field(
        default=None, metadata={"help": "With --bits: paper (the default) or serving."}
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "With --bits: columns that share a scale; -1 (the default) a row."},
    )
    weight_scale_dtype: str | None = field(
        default=None,
        metadata={
            "help": "With --bits: bfloat16 (the default), float32, or integer (groups: whole"
            " multiples of a row's scale)."
        },
    )
    released: bool = field(
        default=False,
        metadata={
            "help": "With --bits: the model is a checkpoint of the paper's released code; pack the"
            " codes that code computed."
        },
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda: where the codes are made."})
    verify: bool = field(
        default=False, metadata={"help": "Reload the folder and compare every bit."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object."})


ARGUMENTS = (ExportArguments,)


def _requested(a: ExportArguments) -> QATConfig | None:
    """The setting of a plain model; options without one are an error."""
    names = ("kv_mode", "group_size", "weight_scale_dtype")
    options = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    if a.bits is not None:
        return QATConfig.parse(a.bits, **options)
    for name in options:
        raise ConfigError(
            f"--{name.replace('_', '-')}: needs --bits; a prepared model has its setting already"
        )
    return None


def run(arguments: ExportArguments) -> None:
    """Load, convert, save, and verify if asked; prints the sizes."""
    a = arguments
    if Path(a.output).resolve() == Path(a.model).resolve():
        raise ConfigError(f"output: {a.output} is the model's own folder; name another one")
    check_replaceable(a.output)
    dtype = None if a.dtype is None else parse_dtype(a.dtype)
    requested = _requested(a)
    model = load_model(a.model, dtype=None, device=parse_device(a.device))
    state = state_of(model)
    if state is not None and state.stage == PACKED:
        raise ConfigError(
            f"model: {a.model} is packed already; copy it, or export the prepared model"
        )
    if state is None and requested is None:
        raise ConfigError(
            f"model: {a.model} is not quantized; export a prepared one, or give e.g. --bits 4-8-8"
        )
    if state is not None and requested is not None:
        raise ConfigError(
            f"bits: {a.model} is prepared as {state.config.setting} already; leave --bits out"
        )
    linears = [
        (name, module.weight.numel()) for name, _, module in iter_linears(model, find_family(model))
    ]
    imported = None
    if a.released:
        if requested is None:
            raise ConfigError(
                "released: needs --bits, the W-A-KV setting that the model was trained with"
            )
        imported = import_released(model, requested)
    else:
        convert(model, requested)
    if dtype is not None:
        # After convert: the codes come from the weights as they were trained. Parameters only: a
        # model-wide cast would round the rotary frequencies, which no checkpoint holds.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    save_pretrained(model, a.output, tokenizer=a.model if has_tokenizer(a.model) else None)
    result = {
        "output": a.output,
        "setting": state_of(model).config.setting,
        **_sizes(a.output, linears),
    }
    if imported is not None:
        result["released"] = imported.to_dict()
    if a.verify:
        result["verified"] = verify_export(model, a.output).to_dict()
    print(json.dumps(result) if a.json else describe(result))


def _sizes(folder: str, linears: list[tuple[str, int]]) -> dict[str, Any]:
    """Bytes on disk, by the headers of the files that were written."""
    names = {name for name, _ in linears}
    tensors = inspect(folder).tensors
    packed = sum(
        info.end - info.begin for key, info in tensors.items() if key.rpartition(".")[0] in names
    )
    full = sum(count for _, count in linears) * BYTES_PER_BF16
    return {
        "linear_bytes": packed,
        "linear_bytes_bf16": full,
        "linear_ratio": packed / full,
        "total_bytes": sum(info.end - info.begin for info in tensors.values()),
    }


def describe(result: dict[str, Any]) -> str:
    """The result as one to three lines."""
    text = (
        f"{result['output']}: {result['setting']}, {result['total_bytes'] / MIB:.1f} MiB; linears"
        f" {result['linear_bytes'] / MIB:.1f} MiB, {result['linear_ratio']:.3f}x of bf16"
    )
    released = result.get("released")
    if released is not None:
        text += (
            f"\nreleased code: {released['clamped_codes']} of {released['weights']} codes were"
            f" beyond the grid and are clamped, in {released['clamped_rows']} of"
            f" {released['rows']} rows"
        )
    checked = result.get("verified")
    if checked is None:
        return text
    return (
        f"{text}\nverified: {checked['tensors']} tensors, {checked['elements']} elements and"
        f" {checked['logits']} logits equal"
    )
