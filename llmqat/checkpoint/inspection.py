"""Checking a model folder, strictly, before a tensor of it is read.

Order: config.json, manifest (sizes, then SHA-256), then the tensor headers against the exact
expectation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmqat.checkpoint.architecture import Architecture, parse_architecture
from llmqat.checkpoint.format import (
    CONFIG,
    INDEX,
    SINGLE,
    TensorRule,
    check_tensors,
    expected_tensors,
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
)
from llmqat.config import QATConfig
from llmqat.errors import CheckpointError, ConfigError
from llmqat.state import PACKED, State


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
    rules = with_context(where, expected_tensors, arch, *described)
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


def with_context(where: str, function: Any, *args: Any) -> Any:
    """``function(*args)``; what it refuses is an error of the file ``where``."""
    try:
        return function(*args)
    except (ConfigError, CheckpointError) as error:
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
    state: State = with_context(where, State.from_dict, raw["llmqat"])
    expected = None
    if state.stage == PACKED:
        with_context(where, state.config.check_packable)
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
