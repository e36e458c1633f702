"""Which backend runs an operator: one table, no silent fallback.

``auto`` prefers the device's kernels and falls back to ``reference`` only with an announcement
(once). A backend asked for by name that cannot run raises :class:`BackendUnavailable` with the
reason; ``cuda`` leaves operators that have no CUDA C++ kernel by design to Triton, announced once.
``choices()`` is what ``llmqat info`` prints.
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
from .backends import triton
from .backends.composite import COMPOSITES
from .backends.reference import REFERENCE
from .errors import BackendUnavailable, InvalidArgument
from .schemas import SCHEMAS

logger = logging.getLogger("llmqat_kernels")

PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""Device type -> the kernel backends that ``auto`` tries, best first."""
BESIDE = {"cuda": ("triton",)}
"""Named backend -> who runs the operators that it has no kernel for."""
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_requested = "auto"
_as_composed: frozenset[str] = frozenset()


LAYOUT_READERS = (
    "repacked_matmul",
    "repacked_matmul_silu_mul",
    "repacked_matmul_add",
    "repacked_linear",
    "repacked_linear_add",
    "float_matmul",
)
"""Operators on weights of ``repack_weight``: only the backend that wrote the layout reads it."""


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
        name: ``auto``, ``reference``, ``cpu``, ``cuda`` (CUDA C++ first, then Triton) or
            ``triton``.

    Raises:
        InvalidArgument: unknown name.
        BackendUnavailable: the backend cannot run here at all.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if name not in BACKENDS:
            raise InvalidArgument(f"backend: {name!r} is unknown; use one of {', '.join(BACKENDS)}")
        if reason := _why_not(name):
            raise BackendUnavailable(f"backend {name!r} is not available: {reason}")
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


class use_composed:
    """Compose operators of others even where the backend has a kernel of its own, from the call on;
    as a context manager, until the block ends.

    Outputs that the specification calls exact stay the same bits. The gradients of an integer
    linear, ``qat_matmul_backward_input`` and ``qat_matmul_backward_weight``, then read a tensor of
    dequantized codes by torch's product instead of codes by ours (for the time of the product).

    Args:
        ops: names of operators; none ends what was asked for before.

    Raises:
        InvalidArgument: an operator that is not composed of others anywhere.
    """

    def __init__(self, *ops: str) -> None:
        if unknown := sorted(set(ops) - COMPOSITES.keys()):
            raise InvalidArgument(
                f"ops: {', '.join(unknown)} cannot be composed; choose of"
                f" {', '.join(sorted(COMPOSITES))}"
            )
        global _as_composed
        self._previous, _as_composed = _as_composed, frozenset(ops)

    def __enter__(self) -> use_composed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _as_composed
        _as_composed = self._previous


def current_backend() -> str:
    """The backend asked for last (``auto`` unless ``use_backend`` said otherwise)."""
    return _requested


def _why_not(backend: str) -> str:
    """Why a kernel backend cannot run at all; an empty string if it can."""
    if backend in ("cpu", "cuda"):
        return "" if native.is_available() else native.why_not()
    return triton.why_not() if backend == "triton" else ""


def _devices(backend: str) -> tuple[str, ...]:
    """The device types whose tensors a kernel backend reads."""
    return triton.devices() if backend == "triton" else (backend,)


def _own_kernel(backend: str, op: str) -> tuple[Callable[..., Any] | None, str]:
    """The kernel that ``backend`` has for ``op`` or None, with the reason."""
    if reason := _why_not(backend):
        return None, reason
    if backend == "triton":
        kernel = triton.kernels().get(op)
        return kernel, "Triton" if kernel else f"there is no Triton kernel for {op}"
    try:
        kernel = getattr(getattr(torch.ops, f"llmqat_{backend}"), op).default
    except AttributeError:
        return None, f"the native library has no {backend} kernel for {op}"
    return kernel, f"native library, {native.isa()}" if backend == "cpu" else "native library"


def _candidates(device_type: str, requested: str) -> tuple[str, ...]:
    """Kernel backends to try, best first; none if the one asked for is of another device."""
    if requested == "reference":
        return ()
    if requested == "auto":
        wanted = PREFERENCE.get(device_type, ())
    else:
        wanted = (requested, *BESIDE.get(requested, ()))
    usable = tuple(backend for backend in wanted if device_type in _devices(backend))
    return usable if requested in ("auto", *usable) else ()


_announced: set[tuple[str, bool]] = set()


def _announce_fallback(op: str, device_type: str, reason: str, available: bool) -> None:
    """Say once per device type that it has no kernels, or once per operator that lacks one."""
    key = (f"{device_type}/{op}" if available else device_type, available)
    if key not in _announced:
        _announced.add(key)
        what = op if available else "every operator"
        logger.warning("%s on %s runs on the reference backend: %s", what, device_type, reason)


def _announce_beside(op: str, requested: str, backend: str) -> None:
    """Say once that operators which the backend asked for lacks run on another."""
    key = (f"{requested}/{backend}", True)
    if key not in _announced:
        _announced.add(key)
        logger.warning(
            "backend %r has no kernel for some operators (%s is the first); %s runs them",
            requested, op, backend,
        )  # fmt: skip


def resolve(op: str, device_type: str, requested: str) -> Choice:
    """The backend for ``op`` on ``device_type`` under the request; announced once when it is a
    fallback.
    """
    return _resolved(op, device_type, requested, op in _as_composed)


@cache
def _resolved(op: str, device_type: str, requested: str, composed: bool) -> Choice:
    candidates = _candidates(device_type, requested)
    if op in LAYOUT_READERS:
        writer = resolve("repack_weight", device_type, requested).backend
        candidates = (writer,) if writer in candidates else candidates
    if not candidates:
        if requested not in ("auto", "reference"):
            raise BackendUnavailable(
                f"backend {requested!r} cannot run {op} on {device_type}; move the tensor or use"
                " 'auto'"
            )
        reason = "asked for" if requested == "reference" else f"no kernels for {device_type}"
        return Choice(op, device_type, "reference", reason, REFERENCE[op])
    reasons = []
    for backend in candidates:
        kernel, reason = _own_kernel(backend, op)
        if kernel is not None and not composed:
            if requested not in ("auto", backend):
                _announce_beside(op, requested, backend)
            return Choice(op, device_type, backend, reason, kernel)
        reasons.append(reason)
    usable = [backend for backend in candidates if not _why_not(backend)]
    if usable and op in COMPOSITES:
        reason = "composed of other operators or plain torch"
        return Choice(op, device_type, usable[0], reason, COMPOSITES[op])
    reason = "; ".join(dict.fromkeys(reasons))
    if requested != "auto":
        raise BackendUnavailable(f"backend {requested!r} cannot run {op}: {reason}")
    _announce_fallback(op, device_type, reason, bool(usable))
    return Choice(op, device_type, "reference", reason, REFERENCE[op])


def call(op: str, args: tuple[Any, ...]) -> Any:
    """Run ``op`` on the backend its first tensor and the current request select."""
    choice = resolve(op, args[0].device.type, _requested)
    native = isinstance(choice.kernel, torch._ops.OpOverload)
    if native or not torch.is_autocast_enabled(choice.device_type):
        return choice.kernel(*args)
    # Operators have fixed dtypes: autocast must not reach the torch calls inside a backend.
    with torch.autocast(choice.device_type, enabled=False):
        return choice.kernel(*args)


def choices(device_type: str) -> list[Choice]:
    """The ``auto`` choice of every operator on ``device_type``, without announcing fallbacks."""
    logger.disabled, was_disabled = True, logger.disabled
    try:
        return [resolve(op, device_type, "auto") for op in SCHEMAS]
    finally:
        logger.disabled = was_disabled
