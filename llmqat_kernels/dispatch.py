"""Which backend runs an operator: one table, no silent fallback.

``auto`` prefers the device's native library and falls back to ``reference`` only with an
announcement
(once); a backend asked for by name that cannot run raises
:class:`BackendUnavailable` with the reason. ``choices()`` is what ``llmqat info`` prints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch

from . import native
from .backends.reference import REFERENCE
from .errors import BackendUnavailable, InvalidArgument
from .schemas import SCHEMAS

logger = logging.getLogger("llmqat_kernels")

NATIVE_BACKEND = {"cpu": "cpu", "cuda": "cuda"}
"""Device type -> the native backend whose namespace is ``llmqat_<backend>``."""
BACKENDS = ("auto", "reference", "cpu", "cuda")

_requested = "auto"


@dataclass(frozen=True)
class Choice:
    """The backend that runs ``op`` on ``device_type``, and why."""

    op: str
    device_type: str
    backend: str
    reason: str
    kernel: Callable[..., Any]


class use_backend:
    """Select the backend of every operator, from the call on; as a context manager, until the
    block ends.

    Args:
        name: ``auto``, ``reference``, ``cpu`` or ``cuda``.

    Raises:
        InvalidArgument: unknown name.
        BackendUnavailable: the backend cannot run here at all.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if name not in BACKENDS:
            raise InvalidArgument(f"backend: {name!r} is unknown; use one of {', '.join(BACKENDS)}")
        if name in NATIVE_BACKEND.values() and not native.is_available():
            raise BackendUnavailable(f"backend {name!r} is not available: {native.why_not()}")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _requested
        _requested = self._previous


def current_backend() -> str:
    """The backend asked for last (``auto`` unless ``use_backend`` said otherwise)."""
    return _requested


def _native_kernel(backend: str, op: str) -> tuple[Callable[..., Any] | None, str]:
    """The native kernel of ``op`` or None, with the reason."""
    if not native.is_available():
        return None, native.why_not()
    try:
        kernel = getattr(getattr(torch.ops, f"llmqat_{backend}"), op).default
    except AttributeError:
        return None, f"the native library has no {backend} kernel for {op}"
    return kernel, f"native library, {native.isa()}" if backend == "cpu" else "native library"


_announced: set[tuple[str, bool]] = set()


def _announce_fallback(op: str, device_type: str, reason: str) -> None:
    """Say once per device type that the library is missing, or once per operator that it has no
    kernel.
    """
    available = native.is_available()
    key = (f"{device_type}/{op}" if available else device_type, available)
    if key not in _announced:
        _announced.add(key)
        what = op if available else "every operator"
        logger.warning("%s on %s runs on the reference backend: %s", what, device_type, reason)


@cache
def resolve(op: str, device_type: str, requested: str) -> Choice:
    """The backend for ``op`` on ``device_type`` under the request; announced once when it is a
    fallback.
    """
    native_name = NATIVE_BACKEND.get(device_type)
    if requested not in ("auto", "reference", native_name):
        raise BackendUnavailable(
            f"backend {requested!r} cannot run {op} on {device_type}; move the tensor or use 'auto'"
        )
    if requested == "reference" or native_name is None:
        reason = "asked for" if requested == "reference" else f"no native backend for {device_type}"
        return Choice(op, device_type, "reference", reason, REFERENCE[op])
    kernel, reason = _native_kernel(native_name, op)
    if kernel is not None:
        return Choice(op, device_type, native_name, reason, kernel)
    if requested != "auto":
        raise BackendUnavailable(f"backend {requested!r} cannot run {op}: {reason}")
    _announce_fallback(op, device_type, reason)
    return Choice(op, device_type, "reference", reason, REFERENCE[op])


def call(op: str, args: tuple[Any, ...]) -> Any:
    """Run ``op`` on the backend its first tensor and the current request select."""
    choice = resolve(op, args[0].device.type, _requested)
    if choice.backend != "reference":
        return choice.kernel(*args)
    with torch.autocast(choice.device_type, enabled=False):
        return choice.kernel(*args)


def choices(device_type: str) -> list[Choice]:
    """The ``auto`` choice of every operator on ``device_type``, without announcing fallbacks."""
    logger.disabled, was_disabled = True, logger.disabled
    try:
        return [resolve(op, device_type, "auto") for op in SCHEMAS]
    finally:
        logger.disabled = was_disabled
