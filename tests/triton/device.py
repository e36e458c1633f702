"""Where the Triton tests run: the interpreter on CPU tensors, or a CUDA device with
``TRITON_INTERPRET=0`` (`make test-gpu`). The bodies are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmqat_kernels import use_backend
from llmqat_kernels.backends import triton

DEVICE = torch.device(triton.devices()[0])


def on_device(value: Any) -> Any:
    """A tensor, or the tensors of a tuple, on ``DEVICE``."""
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def on_cpu(value: Any) -> Any:
    """A tensor, or the tensors of a tuple, on the CPU."""
    if isinstance(value, tuple):
        return tuple(map(on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


def run(op: str, *args: Any) -> Any:
    """The Triton backend's result of an operator, on the CPU."""
    with use_backend("triton"):
        return on_cpu(getattr(torch.ops.llmqat, op)(*map(on_device, args)))
