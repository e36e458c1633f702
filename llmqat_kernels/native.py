"""Finds and loads the native library, and says why it cannot be used where it cannot.

The library is optional: the package imports without it. ``setup.py`` builds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .errors import BackendUnavailable

MIN_TORCH = (2, 11)
"""The library uses the stable ABI of this torch; it loads into that one and every later one."""
ISAS = ("scalar", "avx2", "avx512vnni")
BUILD_COMMAND = "python setup.py build_ext --inplace"


def _library() -> Path | None:
    """The shared library beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _disabled() -> bool:
    return os.environ.get("LLMQAT_NATIVE", "1") == "0"


@cache
def _load() -> str:
    """Load the library once; the reason why not, or an empty string."""
    if _disabled():
        return "LLMQAT_NATIVE=0 turns the native library off"
    path = _library()
    if path is None:
        return f"the native library is not built: run `{BUILD_COMMAND}` and read its summary"
    if _version(torch.__version__) < MIN_TORCH:
        minimum = ".".join(map(str, MIN_TORCH))
        return f"torch {torch.__version__} is too old: install torch >= {minimum}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}; rebuild with `{BUILD_COMMAND}`"
    return ""


def is_available() -> bool:
    """Whether the native library is loaded (the first call loads it)."""
    return _load() == ""


def why_not() -> str:
    """Why the native library cannot be used; an empty string if it can."""
    return _load()


def _require() -> None:
    if reason := _load():
        raise BackendUnavailable(reason)


def build_info() -> dict[str, Any]:
    """How the library was built: compiler, flags, torch, CUDA version and architectures, ISAs.

    Empty when the library is not available.
    """
    if not is_available():
        return {}
    info: dict[str, Any] = json.loads(torch.ops.llmqat_cpu.build_info())
    return info


def isa() -> str:
    """The instruction set of the CPU operators, one of ``ISAS``; ``none`` without the library."""
    return str(torch.ops.llmqat_cpu.get_isa()) if is_available() else "none"


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, slowest first; empty without the library."""
    if not is_available():
        return ()
    return ISAS[: ISAS.index(str(torch.ops.llmqat_cpu.detected_isa())) + 1]


@contextmanager
def set_isa(name: str) -> Iterator[None]:
    """Run the CPU operators with one instruction set inside the ``with`` block, in every thread.

    Args:
        name: one of :func:`supported_isas`.

    Raises:
        BackendUnavailable: no library, an unknown name, or one that this CPU lacks.
    """
    _require()
    if name not in supported_isas():
        choices = ", ".join(supported_isas())
        raise BackendUnavailable(f"isa: {name!r} cannot run here; use one of {choices}")
    previous = isa()
    torch.ops.llmqat_cpu.set_isa(name)
    try:
        yield
    finally:
        torch.ops.llmqat_cpu.set_isa(previous)
