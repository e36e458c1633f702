"""The Triton backend: CUDA devices, or the CPU under Triton's interpreter (``TRITON_INTERPRET=1``).

Nothing of triton is imported until a kernel is asked for, so the package works without it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

MODULES = (
    "quantize",
    "channels",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "quantized_linear",
    "repacked_matmul",
    "qat_matmul_backward",
    "integer_groups",
    "rope_quantize_append",
    "attention_decode",
    "distillation_loss",
    "sample",
)
"""Files of kernels; each has ``KERNELS``, the operators it implements, and ``variants()``."""
MIN_TRITON = (3, 6)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def devices() -> tuple[str, ...]:
    """The device types whose tensors the kernels read."""
    return ("cpu",) if interpreting() else ("cuda",)


@cache
def why_not() -> str:
    """Why the backend cannot run here; an empty string if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        minimum = ".".join(map(str, MIN_TRITON))
        return f"triton {triton.__version__} is too old: install triton >= {minimum}"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on CPU tensors"
    return ""


@cache
def kernels() -> dict[str, Callable[..., Any]]:
    """Operator -> function on tensors, of every file of kernels."""
    if interpreting():
        from . import interpreter

        interpreter.repair()
    found: dict[str, Callable[..., Any]] = {}
    for name in MODULES:
        found |= importlib.import_module(f"{__name__}.{name}").KERNELS
    return found
