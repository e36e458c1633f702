"""Which tile a kernel takes: what was measured on an architecture, or the kernel's own heuristic.

``tiles/sm_<arch>.json`` holds what `python -m benchmarks.tune` found to be faster than the
heuristic on a device of that architecture, for each operator and bucket of shapes:

    {"arch": 90, "source": "measured", "device": ..., "triton": ...,
     "tiles": {"quantized_matmul": {"M<=128 N<=4096 K<=4096 w=4": {"tile": {"m": 64, ...}, ...}}}}

Nothing is ever tuned by a call: a bucket that is not in the file takes the heuristic. A tile
changes time and never a result. Use, in a file of kernels:

    tile = tile_for("quantized_matmul", bucket(M=m, N=n, K=k, w=f"{bits}"), architecture(x.device),
                    default_tile(m, n, k, arch))

where tiles are frozen dataclasses of integers and ``CANDIDATES = {"quantized_matmul": (Tile(...),
...)}`` names the ones worth timing. Tests: tests/triton/test_tiles.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...errors import BackendUnavailable, InvalidArgument
from . import interpreting

ARCHS = (80, 90)
"""Architectures with a table, oldest first."""
FOLDER = Path(__file__).with_suffix("")
LARGEST = 32_768
"""Sizes above it share a bucket: they fill every multiprocessor many times over."""
NOT_MEASURED = "not yet measured"

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """One question to `tile_for`, for `benchmarks.tune`."""

    op: str
    key: str
    arch: int
    default: Any


_forced: dict[str, Any] = {}
_asked: list[Asked] | None = None


def bucket(**sizes: int | str) -> str:
    """The key of a shape: integers rounded up to powers of two, strings as they are.

    ``bucket(M=100, N=128256, w="4")`` is ``"M<=128 N>32768 w=4"``.
    """
    return " ".join(name + _range(value) for name, value in sizes.items())


def _range(value: int | str) -> str:
    if isinstance(value, str):
        return f"={value}"
    return f">{LARGEST}" if value > LARGEST else f"<={1 << max(value - 1, 0).bit_length()}"


def table_of(capability: tuple[int, int]) -> int:
    """The architecture whose table serves a device of this compute capability.

    It is the newest known one that is not newer than the device.

    Raises:
        BackendUnavailable: a device older than sm_80, which has no bf16 and no int8 tensor cores.
    """
    arch = 10 * capability[0] + capability[1]
    known = [a for a in ARCHS if a <= arch]
    if not known:
        raise BackendUnavailable(
            f"triton: a device of sm_{arch} is too old, sm_{ARCHS[0]} or newer is needed;"
            ' choose another backend with use_backend("reference")'
        )
    return known[-1]


@cache
def _of_cuda(index: int) -> int:
    return table_of(torch.cuda.get_device_capability(index))


def architecture(device: torch.device) -> int:
    """80 or 90: the table that serves ``device``; the newest one when interpreting."""
    if interpreting() or device.type != "cuda":
        return ARCHS[-1]
    return _of_cuda(torch.cuda.current_device() if device.index is None else device.index)


def parse(text: str, where: str) -> dict[str, Any]:
    """The content of a table.

    Raises:
        InvalidArgument: no object with ``arch``, ``source`` and ``tiles`` of integers.
    """
    try:
        found = json.loads(text)
        for buckets in found["tiles"].values():
            for entry in buckets.values():
                if not all(type(value) is int for value in entry["tile"].values()):
                    raise TypeError("a tile is made of integers")
        if found["arch"] not in ARCHS or not isinstance(found["source"], str):
            raise KeyError("arch and source")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"tiles: {where} is no table of tiles ({type(error).__name__}: {error});"
            " restore it or run `python -m benchmarks.tune`"
        ) from error
    return dict(found)


@cache
def table(arch: int) -> dict[str, Any]:
    """The table of an architecture, read once."""
    path = FOLDER / f"sm_{arch}.json"
    return parse(path.read_text(), path.name)


def tile_for(op: str, key: str, arch: int, default: T) -> T:
    """The measured tile of ``op`` for the bucket ``key``, or ``default``.

    Args:
        op: the name under which the file of kernels lists its ``CANDIDATES``.
        key: from `bucket`.
        arch: from `architecture`.
        default: what the kernel's own heuristic chose; a dataclass of integers.

    Raises:
        InvalidArgument: the table has a tile with other fields than ``default``.
    """
    if _asked is not None:
        _asked.append(Asked(op, key, arch, default))
    if op in _forced:
        return _forced[op]
    found = table(arch)["tiles"].get(op, {}).get(key)
    return default if found is None else as_tile(found["tile"], default, f"{op} {key}")


def as_tile(values: Mapping[str, int], like: T, where: str) -> T:
    """A tile of the class of ``like``.

    Raises:
        InvalidArgument: ``values`` has other fields.
    """
    names = [field.name for field in fields(like)]  # type: ignore[arg-type]
    if set(values) != set(names):
        raise InvalidArgument(
            f"tiles: {where} has the fields {', '.join(values)}, not {', '.join(names)};"
            " run `python -m benchmarks.tune` again"
        )
    return type(like)(**values)


@contextmanager
def forced(op: str, tile: Any) -> Iterator[None]:
    """Every launch of ``op`` takes ``tile``: for tuning, and to test that no tile changes a bit."""
    before = dict(_forced)
    _forced[op] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def asked() -> Iterator[list[Asked]]:
    """The questions to `tile_for` while the context is open."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before
