"""Writing a model folder, so that at every moment either the old or the new checkpoint is complete
on the disk.

Everything is written and flushed into a hidden folder beside the target; then the target is renamed
away, the new folder takes its name, what was not part of the old checkpoint (other files,
sub-folders) moves over, and the old checkpoint is deleted. A failure while writing leaves the
target untouched; a crash between the renames leaves the old checkpoint complete under
`.<name>.old-<hex>` beside it.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from llmqat import io
from llmqat.checkpoint.architecture import Architecture, parse_architecture
from llmqat.checkpoint.format import (
    CONFIG,
    FLOATS,
    GENERATION_CONFIG,
    HEAD,
    INDEX,
    MANIFEST,
    SINGLE,
    TORCH_DTYPES,
    decode_linear,
    encode_linear,
    expected_tensors,
    is_learned_scale,
    linear_shape,
    quantization_config,
)
from llmqat.checkpoint.manifest import write_manifest
from llmqat.checkpoint.validate import FILE_NAME, SHARD_NAME
from llmqat.config import QATConfig
from llmqat.errors import CheckpointError, ConfigError
from llmqat.models import compat
from llmqat.models.families import find_family, iter_linears
from llmqat.nn.quantized_linear import BUFFERS, QuantizedLinear
from llmqat.state import PACKED, state_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_FLOAT_DTYPES = {TORCH_DTYPES[name] for name in FLOATS}


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model folder that :func:`from_pretrained` and transformers read.

    A converted model is written packed, in the compressed-tensors layout; any other with its float
    weights. The settings go to config.json (`llmqat`), sizes and SHA-256 of all files to
    `llmqat_manifest.json`.

    Args:
        dtype: type of the float tensors that are not quantized; None keeps the model's. Scales keep
            their value.
        tokenizer: an object with `save_pretrained`, or a folder whose tokenizer files are copied.
        max_shard_size: bytes or e.g. "5GB"; larger models are split over several files.

    Returns:
        The folder.

    Raises:
        ConfigError: a model that this package could not load again; nothing is written.
        OSError: the folder cannot be written; what was there before is still there.
    """
    if dtype is not None and dtype not in _FLOAT_DTYPES:
        raise ConfigError(
            f"dtype: {dtype} is not supported; use float32, float16 or bfloat16, or None"
        )
    target = _target(directory)
    config = _config_json(model, dtype)
    tensors = _tensors(model, config, dtype)
    io.make_dir(target.parent)
    with _replaced_folder(target) as folder:
        _write_tensors(folder, tensors, max_shard_size)
        generation = compat.generation_fields(model)
        if generation is not None:
            io.write_json(folder / GENERATION_CONFIG, generation)
        if tokenizer is not None:
            _write_tokenizer(folder, tokenizer)
        io.write_json(folder / CONFIG, config)
        write_manifest(folder)
    return target


def check_replaceable(directory: str | os.PathLike[str], option: str = "--output") -> None:
    """For commands, before any work: only a packed checkpoint may be replaced by another.

    Raises:
        ConfigError: the folder holds full-precision or prepared weights, or what cannot be read.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        return
    try:
        stage = json.loads(path.read_bytes())["llmqat"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        stage = "full-precision"
    if stage != PACKED:
        raise ConfigError(
            f"{option}: {directory} holds a {stage} model, which would be lost; name another folder"
        )


def _target(directory: str | os.PathLike[str]) -> Path:
    """The folder to replace: no link, and nothing that cannot be renamed."""
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"directory: {target} is a file; name a folder")
    if target.is_mount() or Path.cwd().is_relative_to(target):
        raise ConfigError(
            f"directory: {target} is a mount point or holds the current directory; name a folder"
            " inside it"
        )
    return target


def _config_json(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    find_family(model)
    fields = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "llmqat"):
        fields.pop(key, None)
    state = state_of(model)
    fields["architectures"] = [find_family(model).architecture]
    fields["dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    if state is not None:
        fields["llmqat"] = state.to_dict()
        if state.stage == PACKED:
            fields["quantization_config"] = quantization_config(state.config)
    return fields


def _tensors(
    model: nn.Module, config: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """All tensors of the checkpoint, checked against what the loader will expect."""
    state = state_of(model)
    settings = None if state is None else state.config
    packed = settings if state is not None and state.stage == PACKED else None
    try:
        arch = parse_architecture(config, "config")
        rules = expected_tensors(arch, packed, None if packed is not None else settings)
    except CheckpointError as error:
        raise ConfigError(f"model: cannot be saved, {error}") from error
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in BUFFERS or (name == HEAD and arch.tied):
            continue
        if dtype is not None and tensor.is_floating_point() and not is_learned_scale(name):
            tensor = tensor.to(dtype)
        tensors[name] = tensor.detach().cpu().contiguous()
    if packed is not None:
        tensors.update(_packed_tensors(model, arch, packed))
    names = {str(v): k for k, v in TORCH_DTYPES.items()}
    for name, tensor in tensors.items():
        rule = rules.get(name)
        if (
            rule is None
            or rule.shape != tuple(tensor.shape)
            or names.get(str(tensor.dtype)) not in rule.dtypes
        ):
            raise ConfigError(
                f"model: {name} {tuple(tensor.shape)} {tensor.dtype} does not fit its config;"
                " cannot save"
            )
    for name, rule in rules.items():
        if name not in tensors and not rule.optional:
            raise ConfigError(f"model: {name} is missing; its config asks for it, cannot save")
    return tensors


def _packed_tensors(model: nn.Module, arch: Architecture, packed: QATConfig) -> dict[str, Tensor]:
    result = {}
    for name, short, module in iter_linears(model, arch.family):
        if not isinstance(module, QuantizedLinear):
            raise ConfigError(
                f"{name}: expected a QuantizedLinear, found {type(module).__name__}; convert a"
                " fresh model"
            )
        shape = linear_shape(arch, short, packed)
        encoded = encode_linear(module.weight_codes.cpu(), module.scales.cpu(), shape)
        try:
            decode_linear(encoded, shape, name)
        except CheckpointError as error:  # what the loader would refuse, before anything is written
            raise ConfigError(f"model: cannot be saved, {error}") from error
        result.update({f"{name}.{key}": tensor for key, tensor in encoded.items()})
    return result


def _write_tensors(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        with io.atomic_path(folder / file) as path:
            save_file({name: tensors[name] for name in names}, path, metadata={"format": "pt"})
    if split.is_sharded:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        io.write_json(folder / INDEX, index)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    if isinstance(tokenizer, str | os.PathLike):
        source = Path(tokenizer)
        found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
        if not found:
            raise ConfigError(
                f"tokenizer: {source} has no tokenizer file; expected e.g. tokenizer.json"
            )
        for name in found:
            io.write_bytes(folder / name, (source / name).read_bytes())
        return
    if not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(
            f"tokenizer: expected a tokenizer or a folder, got {type(tokenizer).__name__}"
        )
    with _temporary_folder(folder / ".tokenizer") as temp:
        tokenizer.save_pretrained(str(temp))
        for path in sorted(temp.iterdir()):
            if path.is_file() and FILE_NAME.fullmatch(path.name):
                io.write_bytes(folder / path.name, path.read_bytes())


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def _replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends well."""
    mark = secrets.token_hex(4)
    new = target.with_name(f".{target.name}.new-{mark}")
    old = target.with_name(f".{target.name}.old-{mark}")
    try:
        try:
            new.mkdir()
        except OSError as error:
            raise io.error_at(error, target) from error
        yield new
        io.fsync_dir(new)
        if target.exists():
            os.rename(target, old)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(old, target)
                raise
        else:
            os.rename(new, target)
        io.fsync_dir(target.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if old.exists():
        _keep_foreign(old, target)
        shutil.rmtree(old)
        io.fsync_dir(target.parent)


def interrupted(directory: str | os.PathLike[str]) -> list[Path]:
    """Folders that a killed :func:`save_pretrained` moved away from ``directory``."""
    target = Path(directory).absolute()
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.old-*"))


def finish_interrupted(directory: str | os.PathLike[str]) -> None:
    """Do the rest of a save that was killed between its renames: the old folder comes back, or
    gives the new one what is no part of a checkpoint. Nobody else may be writing there.
    """
    target = Path(directory).absolute()
    for old in interrupted(target):
        if target.exists():
            _keep_foreign(old, target)
            shutil.rmtree(old)
        else:
            os.rename(old, target)
        io.fsync_dir(target.parent)


def _keep_foreign(old: Path, target: Path) -> None:
    """Move what is not part of the replaced checkpoint (other files, sub-folders) over."""
    for entry in sorted(old.iterdir()):
        owned = entry.name in (
            CONFIG,
            GENERATION_CONFIG,
            INDEX,
            SINGLE,
            MANIFEST,
        ) or SHARD_NAME.fullmatch(entry.name)
        if not owned and not os.path.lexists(target / entry.name):
            os.rename(entry, target / entry.name)
    io.fsync_dir(target)
