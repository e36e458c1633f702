"""Reading untrusted folders: regular files, strict JSON, safetensors headers. Knows nothing of
models.

Everything is checked before any tensor is allocated, with sizes in Python integers. Every failure
is a CheckpointError of one line that names the file. No file is ever unpickled, imported or
executed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from llmqat.errors import CheckpointError

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_METADATA_BYTES = 64 << 10
MAX_TENSORS = 65_536
MAX_NDIM = 4
MAX_DIM = 2**31 - 1
MAX_JSON_DEPTH = 16
MAX_INT = 2**53

TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")
SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BRACKET = re.compile(rb"[][{}]")
PICKLE_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".npy",
    ".npz",
    ".h5",
    ".msgpack",
)

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of the tensor types that any of our checkpoints may hold."""


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header: type, shape, and its bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def printable(value: object) -> str:
    """A short one-line form of something read from a file, for messages."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def regular_file(folder: Path, name: str) -> Path:
    """The path of a regular file in `folder`, whose resolved place is in that folder too.

    Raises:
        CheckpointError: missing, a folder, FIFO or device, or a symbolic link that leaves the
            folder.
    """
    path = folder / name
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
        mode = os.stat(real).st_mode
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(
            f"{path}: missing or unreadable; copy the whole checkpoint folder"
        ) from error
    if real.parent != home:
        raise CheckpointError(
            f"{path}: is a link that leaves the folder; replace it by the file itself"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file; replace it by the file itself")
    return real


@contextmanager
def open_file(folder: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open `folder/name` for reading; yields (file, size). Never blocks on a FIFO and follows no
    further link.
    """
    real = regular_file(folder, name)
    try:
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be opened: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise CheckpointError(
                f"{folder / name}: is not a regular file; replace it by the file itself"
            )
        yield file, state.st_size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _bounded_int(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INT:
        raise ValueError("a number is larger than 2^53")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object: UTF-8, no duplicate keys, no NaN, integers below 2^53, at most 16 levels.

    Raises:
        CheckpointError: naming `where`.
    """
    depth = 0
    for bracket in _BRACKET.findall(
        data
    ):  # in strings too: no file of ours has that many unbalanced ones
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise CheckpointError(
                f"{where}: JSON nested deeper than {MAX_JSON_DEPTH} levels; not a checkpoint of"
                " ours"
            )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{where}: not valid JSON ({reason}); write the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(folder: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`folder/name` as a strict JSON object of at most `max_bytes` bytes."""
    with open_file(folder, name) as (file, size):
        if size > max_bytes:
            raise CheckpointError(
                f"{folder / name}: {size} bytes, more than the {max_bytes} allowed"
            )
        return parse_json(file.read(max_bytes + 1), str(folder / name))


def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """The checked header of a safetensors file: every tensor by name, in file order.

    The tensors tile the data section exactly: no hole, no overlap, nothing after the end.

    Raises:
        CheckpointError: anything out of the ordinary, before any tensor is read.
    """
    where = str(folder / name)
    with open_file(folder, name) as (file, size):
        if size < 8:
            raise CheckpointError(
                f"{where}: {size} bytes is too short for safetensors; copy the file again"
            )
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(
                f"{where}: header of {length} bytes does not fit the file of {size}; copy it again"
            )
        data = file.read(length)
    if len(data) != length:
        raise CheckpointError(f"{where}: shortened while being read; copy it again")
    if data[:1] != b"{":
        raise CheckpointError(f"{where}: header is not a JSON object; not a safetensors file")
    entries = parse_json(data, where)
    _check_metadata(entries.pop("__metadata__", {}), where)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(
            f"{where}: {len(entries)} tensors, more than the {MAX_TENSORS} allowed"
        )
    tensors = {key: _tensor_info(key, entry, where) for key, entry in entries.items()}
    _check_tiling(tensors, size - 8 - length, where)
    return tensors


def _check_metadata(metadata: object, where: str) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{where}: __metadata__ must map names to strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{where}: __metadata__ is larger than {MAX_METADATA_BYTES} characters"
        )
    if metadata.get("format", "pt") != "pt":
        raise CheckpointError(
            f"{where}: format {printable(metadata['format'])} is not 'pt'; save it from PyTorch"
        )


def is_count(value: object, limit: int) -> bool:
    """Whether `value` is an integer (no bool) in 0..limit."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _tensor_info(name: str, entry: object, where: str) -> TensorInfo:
    if not TENSOR_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where}: tensor name {printable(name)} has characters other than letters, digits, _"
            " and ."
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: {name} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{where}: {name} has dtype {printable(dtype)}; accepted: {', '.join(ITEM_SIZES)}"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_NDIM
        or not all(is_count(n, MAX_DIM) for n in shape)
    ):
        raise CheckpointError(
            f"{where}: {name} has shape {printable(shape)}; at most {MAX_NDIM} dims below 2^31"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(is_count(n, MAX_INT) for n in offsets)
    ):
        raise CheckpointError(
            f"{where}: {name} has data_offsets {printable(offsets)}; expected two byte positions"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(
            f"{where}: {name} is {dtype} {shape} but has {end - begin} bytes; copy the file again"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_tiling(tensors: dict[str, TensorInfo], data_bytes: int, where: str) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise CheckpointError(
                f"{where}: {name} starts at byte {info.begin}, expected {position}; copy it again"
            )
        position = info.end
    if position != data_bytes:
        raise CheckpointError(
            f"{where}: header describes {position} data bytes, the file has {data_bytes}; copy it"
            " again"
        )
