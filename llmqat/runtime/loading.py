"""From a folder to an engine: the choices that ``llmqat generate`` and ``llmqat generate-data``
share.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmqat.checkpoint import from_pretrained
from llmqat.checkpoint.inspection import read_architecture
from llmqat.checkpoint.save import TOKENIZER_FILES
from llmqat.errors import CheckpointError, ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
StrPath = str | os.PathLike[str]


def parse_dtype(name: str, flag: str = "dtype") -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16``; ConfigError naming `flag` for anything else."""
    if name not in DTYPES:
        raise ConfigError(f"{flag}: {name!r} is not supported; use {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """A device that is really there; ConfigError says what is missing."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: this machine or torch build has no CUDA; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} is not there; this machine has cuda:0 to"
            f" cuda:{torch.cuda.device_count() - 1}"
        )
    return device


def set_threads(threads: int | None) -> None:
    """Set torch's threads, which the CPU kernels share; None leaves them."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads: {threads} must be at least 1")
    torch.set_num_threads(threads)


def check_model_folder(directory: StrPath) -> None:
    """Refuse what holds no model of a known family, before its tokenizer is asked for.

    Raises:
        ConfigError: not a folder. CheckpointError: its config.json is none of ours.
    """
    try:
        read_architecture(directory)
    except CheckpointError as error:
        if Path(directory).is_dir():
            raise
        raise ConfigError(f"--model{str(error).removeprefix('directory')}") from error


def check_positions(directory: StrPath, option: str, tokens: int) -> None:
    """Refuse a length beyond the positions of the model in that folder, before it is loaded.

    Raises:
        ConfigError: `tokens`, given by `option`, are more. CheckpointError: no model of ours.
    """
    positions = read_architecture(directory).context
    if tokens > positions:
        raise ConfigError(f"--{option}: the model has {positions} positions, got {tokens}")


def has_tokenizer(directory: StrPath) -> bool:
    """Whether the folder holds tokenizer files."""
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(directory: StrPath) -> Any:
    """The folder's tokenizer; nothing is fetched and no code of the folder runs.

    Raises:
        CheckpointError: the folder has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory}: no tokenizer file; copy tokenizer.json of the original model into it"
        )
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception for malformed files
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {reason}") from error


def load_model(directory: StrPath, *, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A plain, prepared or packed model in eval mode (strict: ``llmqat.from_pretrained``)."""
    return from_pretrained(directory, dtype=dtype, device=device)


def stop_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that end a sequence, ascending: of the generation config, else of the config; may be
    empty.
    """
    for source in (getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            return tuple(sorted({value} if isinstance(value, int) else set(value)))
    return ()
