"""Reading a model folder, strictly: packed, prepared, or a plain model of transformers.

Order: config.json, manifest (sizes, then SHA-256), tensor headers against the exact expectation,
    and only then
memory and data. The model is built from checked numbers on the meta device; every tensor must
arrive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmqat.checkpoint.architecture import Architecture, parse_architecture
from llmqat.checkpoint.format import (
    CONFIG,
    FLOATS,
    GENERATION_CONFIG,
    HEAD,
    INDEX,
    SINGLE,
    TORCH_DTYPES,
    TensorRule,
    check_tensors,
    decode_linear,
    expected_tensors,
    is_learned_scale,
    linear_shape,
    quantization_config,
)
from llmqat.checkpoint.manifest import check_no_strangers, read_manifest
from llmqat.checkpoint.save import interrupted
from llmqat.checkpoint.validate import (
    MAX_INDEX_BYTES,
    PICKLE_SUFFIXES,
    SHARD_NAME,
    TensorInfo,
    printable,
    read_header,
    read_json,
    regular_file,
)
from llmqat.config import QATConfig
from llmqat.convert import prepare, swap_empty
from llmqat.errors import CheckpointError, ConfigError
from llmqat.models import compat
from llmqat.models.families import iter_linears
from llmqat.nn.quantized_linear import BUFFERS, held_scales
from llmqat.state import PACKED, PREPARED, State


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: what it describes, where each tensor is, and its name there."""

    folder: Path
    arch: Architecture
    state: State | None
    rules: dict[str, TensorRule]
    tensors: dict[str, TensorInfo]
    files: dict[str, str]
    stored: dict[str, str]

    @property
    def packed(self) -> QATConfig | None:
        """The settings of a packed checkpoint; None for float weights."""
        return self.state.config if self.state is not None and self.state.stage == PACKED else None


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a model of a known family: converted from a packed folder, prepared from a prepared one,
    plain from any other.

    Args:
        dtype: type of the float tensors that are not quantized (``float32``, ``float16`` or
            ``bfloat16``, of torch or by name); None keeps what is stored.
        device: where the model goes; everything is read and checked on the CPU. `meta` checks the
            folder and gives the model without its weights: every parameter is a shape.

    Returns:
        The family's model in eval mode, e.g. a `LlamaForCausalLM`.

    Raises:
        CheckpointError: one line that names the file and what to do; nothing of the folder is
            executed. ConfigError: a dtype that is not supported, or a device that is not there.
    """
    dtype, device = _float_dtype(dtype), _device(device)
    checkpoint = inspect(directory)
    model = _build(checkpoint, dtype)
    if device.type == "meta":
        compat.tie_head(model)
        _prepare(model, checkpoint)
    else:
        _fill(model, checkpoint, dtype)
        model.to(device)
    _generation_config(model, checkpoint.folder)
    return model


def _float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    for known in (TORCH_DTYPES[name] for name in FLOATS):
        if dtype in (known, str(known).removeprefix("torch.")):
            return known
    raise ConfigError(
        f"dtype: {printable(dtype)} is not supported; use float32, float16 or bfloat16, or None"
    )


def _device(device: torch.device | str) -> torch.device:
    """``device`` if it is there, before anything is read."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device: {printable(device)} is not a device; use cpu, cuda or meta"
        ) from error
    if parsed.type != "cuda":
        return parsed
    from llmqat.runtime.loading import parse_device  # it imports this module

    return parse_device(str(parsed))


def read_architecture(directory: str | os.PathLike[str]) -> Architecture:
    """Check config.json of a folder, and nothing else."""
    folder = _folder(directory)
    return parse_architecture(read_json(folder, CONFIG), str(folder / CONFIG))


def inspect(directory: str | os.PathLike[str]) -> Checkpoint:
    """Check a folder without allocating or reading any tensor (file hashes are verified)."""
    folder = _folder(directory)
    raw = read_json(folder, CONFIG)
    where = str(folder / CONFIG)
    arch = parse_architecture(raw, where)
    state = _state(raw, where)
    packed = state is not None and state.stage == PACKED
    manifest = read_manifest(folder, required=packed)
    settings = None if state is None else state.config
    described = (settings, None) if packed else (None, settings)
    rules = _with_context(where, expected_tensors, arch, *described)
    files, tensors = _locate(folder, manifest)
    if packed:
        check_no_strangers(folder, set(files.values()))
    stored = _stored_names(arch, tensors, rules)
    tensors = {name: tensors[raw] for name, raw in stored.items()}
    check_tensors(tensors, rules, str(folder))
    files = {name: files[raw] for name, raw in stored.items()}
    return Checkpoint(folder, arch, state, rules, tensors, files, stored)


def _stored_names(
    arch: Architecture, tensors: Mapping[str, TensorInfo], rules: Mapping[str, TensorRule]
) -> dict[str, str]:
    """Our name of each tensor: its own, or with the prefix that checkpoints of a model without its
    head leave out (those of GPT-2 on the hub).
    """
    prefix = arch.family.base_prefix
    if prefix is None or any(name.startswith(prefix) for name in tensors):
        return {name: name for name in tensors}
    return {prefix + name if prefix + name in rules else name: name for name in tensors}


def _folder(directory: str | os.PathLike[str]) -> Path:
    try:
        folder = Path(directory)
        is_dir = folder.is_dir()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"directory: {printable(directory)} is not a path") from error
    if not is_dir:
        raise CheckpointError(f"directory: {folder} is not a folder{_interrupted(folder)}")
    return folder


def _interrupted(folder: Path) -> str:
    saved = interrupted(folder) if folder.name else []
    return (
        f"; a save was interrupted, rename {saved[-1].name} to {folder.name}"
        if saved
        else "; name a local model folder"
    )


def _with_context(where: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _state(raw: Mapping[str, Any], where: str) -> State | None:
    quantization = raw.get("quantization_config")
    if raw.get("llmqat") is None:
        if quantization is not None:
            raise CheckpointError(
                f"{where}: quantization_config without an llmqat section; only our own packing is"
                " read"
            )
        return None
    state: State = _with_context(where, State.from_dict, raw["llmqat"])
    expected = None
    if state.stage == PACKED:
        _with_context(where, state.config.check_packable)
        expected = quantization_config(state.config)
    # Compared as JSON text types: True == 1 in Python, but not in a config.
    if _typed(quantization) != _typed(expected):
        raise CheckpointError(
            f"{where}: quantization_config does not say the same as the llmqat section"
        )
    return state


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (type(value).__name__, value)


def _locate(
    folder: Path, manifest: Mapping[str, int] | None
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Which file holds which tensor, and all checked headers."""
    if os.path.lexists(folder / INDEX):
        if os.path.lexists(folder / SINGLE):
            raise CheckpointError(
                f"{folder}: has both {SINGLE} and {INDEX}; remove the one that is out of date"
            )
        return _locate_shards(folder, manifest)
    if not os.path.lexists(folder / SINGLE):
        pickles = sorted(
            name for name in os.listdir(folder) if name.lower().endswith(PICKLE_SUFFIXES)
        )
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: such files can run code when read; convert it to"
                " safetensors"
            )
        raise CheckpointError(f"{folder}: has no {SINGLE}; name a model folder")
    _check_listed(folder, SINGLE, manifest)
    tensors = read_header(folder, SINGLE)
    return dict.fromkeys(tensors, SINGLE), tensors


def _check_listed(folder: Path, name: str, manifest: Mapping[str, int] | None) -> None:
    if manifest is not None and name not in manifest:
        raise CheckpointError(
            f"{folder / name}: is not in the manifest; write the checkpoint again"
        )


def _locate_shards(
    folder: Path, manifest: Mapping[str, int] | None
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    where = str(folder / INDEX)
    _check_listed(folder, INDEX, manifest)
    weight_map = read_json(folder, INDEX, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map must map tensors to files")
    shards: dict[str, int] = {}
    for file in weight_map.values():
        match = SHARD_NAME.fullmatch(file) if isinstance(file, str) else None
        if match is None:
            raise CheckpointError(
                f"{where}: shard name {printable(file)}; expected model-00001-of-00002.safetensors"
            )
        shards[file] = int(match[2])
    names = {f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    if set(shards) != names:
        raise CheckpointError(
            f"{where}: lists {len(shards)} shards that are not numbered 1 to {len(shards)}; copy"
            " all files"
        )
    files: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(shards):
        _check_listed(folder, file, manifest)
        for name, info in read_header(folder, file).items():
            if weight_map.get(name) != file or name in tensors:
                raise CheckpointError(
                    f"{folder / file}: holds {name}, which the index does not place there"
                )
            files[name], tensors[name] = file, info
    for name in weight_map:
        if name not in tensors:
            raise CheckpointError(
                f"{where}: places {printable(name)} in {weight_map[name]}, which does not hold it"
            )
    return files, tensors


def _build(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    arch = checkpoint.arch
    stored = TORCH_DTYPES[checkpoint.tensors[arch.embedding].dtype]
    try:
        model = compat.build_model(arch.family.name, arch.fields, dtype or stored)
    except (
        Exception
    ) as error:  # transformers checks the same numbers in its own way, with its own error classes
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: transformers refuses it: {reason}"
        ) from error
    if checkpoint.packed is not None:
        biases = {
            name.removesuffix(".bias"): dtype or TORCH_DTYPES[info.dtype]
            for name, info in checkpoint.tensors.items()
            if name.endswith(".bias")
        }
        fused = checkpoint.state is not None and checkpoint.state.fused
        where = str(checkpoint.folder / CONFIG)
        _with_context(where, partial(swap_empty, fused=fused), model, checkpoint.packed, biases)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    tensors = dict(_read_model(model, checkpoint, dtype))
    learned = {name: tensors.pop(name) for name in list(tensors) if is_learned_scale(name)}
    if checkpoint.arch.tied:
        tensors[HEAD] = tensors[checkpoint.arch.embedding]
    model.load_state_dict(tensors, strict=True, assign=True)
    if checkpoint.arch.tied:
        compat.tie_head(model)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{checkpoint.folder}: no data for {left[0]}; write the checkpoint again"
        )
    _prepare(model, checkpoint)
    # Only a prepared linear has a place for its learned scale.
    model.load_state_dict(learned, strict=False)


def _prepare(model: nn.Module, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    if state is not None and state.stage == PREPARED:
        where = str(checkpoint.folder / CONFIG)
        _with_context(where, partial(prepare, fused=state.fused), model, state.config)


def _read_model(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Every entry of the model's state dict, from the files."""
    with ExitStack() as stack:
        readers = {}
        for file in sorted(set(checkpoint.files.values())):
            path = regular_file(checkpoint.folder, file)
            try:
                readers[file] = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{checkpoint.folder / file}: {str(error).splitlines()[0][:120]}"
                ) from error

        def read(name: str) -> Tensor:
            return readers[checkpoint.files[name]].get_tensor(checkpoint.stored[name])

        taken = {HEAD} if checkpoint.arch.tied else set()
        packed = checkpoint.packed
        if packed is not None:
            for name, short, _ in iter_linears(model, checkpoint.arch.family):
                keys = (
                    ("weight_packed", "weight_scale", "weight_shape")
                    if packed.w_bits == 4
                    else ("weight", "weight_scale")
                )
                shape = linear_shape(checkpoint.arch, short, packed)
                codes, scale = decode_linear(
                    {key: read(f"{name}.{key}") for key in keys},
                    shape,
                    f"{checkpoint.folder / checkpoint.files[f'{name}.weight_scale']}: {name}",
                )
                taken.update(f"{name}.{key}" for key in keys)
                buffers = zip(BUFFERS, (codes, *held_scales(scale, packed.weight)), strict=True)
                yield from ((f"{name}.{key}", t) for key, t in buffers if t is not None)
        for name in checkpoint.tensors:
            if name not in taken and not checkpoint.rules[name].implied:
                tensor = read(name)
                kept = dtype is None or is_learned_scale(name)
                yield name, tensor if kept else tensor.to(dtype)


def _generation_config(model: nn.Module, folder: Path) -> None:
    if not os.path.lexists(folder / GENERATION_CONFIG):
        return
    fields = read_json(folder, GENERATION_CONFIG)
    try:
        model.generation_config = compat.generation_config(fields)
    except Exception as error:  # transformers raises several classes for malformed fields
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / GENERATION_CONFIG}: {reason}") from error
