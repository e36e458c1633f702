"""The reference backend: the specification itself, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..schemas import SCHEMAS
from ..spec import (
    activation,
    attention,
    channels,
    distillation,
    int4,
    linear,
    norm,
    paged,
    quantize,
    rope,
    sampling,
)

_MODULES = (
    quantize,
    channels,
    int4,
    linear,
    norm,
    activation,
    rope,
    attention,
    paged,
    distillation,
    sampling,
)


def _find(op: str) -> Callable[..., Any]:
    for module in _MODULES:
        function = getattr(module, op, None)
        if function is not None and function.__module__ == module.__name__:
            return function
    raise LookupError(f"spec has no function for operator {op}")


REFERENCE: dict[str, Callable[..., Any]] = {op: _find(op) for op in SCHEMAS}
