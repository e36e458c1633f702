"""What ``torch.cuda`` and Triton need to take the twin for a device: one H200, its clock frozen."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch
import triton.runtime.interpreter as interpreter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from llmqat_kernels.backends import triton as backend
from tests.twin import graphs
from tests.twin.launches import LAUNCHED
from tests.twin.tensors import CUDA, inner

PROPERTIES = SimpleNamespace(
    name="twin", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20
)
CALLS = (
    "_lazy_init", "synchronize", "empty_cache", "set_device", "manual_seed", "manual_seed_all",
    "set_sync_debug_mode", "reset_peak_memory_stats", "set_rng_state", "set_rng_state_all",
)  # fmt: skip
"""Functions of torch.cuda that need to do nothing."""
ANSWERS = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": PROPERTIES.name,
    "get_device_capability": (9, 0),
    "get_device_properties": PROPERTIES,
    "mem_get_info": (1 << 37, 1 << 37),
    "memory_allocated": 1 << 20,
    "max_memory_allocated": 1 << 20,
}


class Stream:
    """Stands for torch.cuda.Stream; everything has ended when it is asked for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        """Nothing."""

    def record(self, *args):
        """Nothing."""

    synchronize = record


class Event(Stream):
    """Stands for torch.cuda.Event."""

    def elapsed_time(self, end):
        """Milliseconds."""
        return 1.0


class Block(nullcontext):
    """Stands for torch.cuda.device and torch.cuda.stream."""

    def __init__(self, *args):
        super().__init__()


class _AnyGenerator(type(torch._C.Generator)):
    def __instancecheck__(cls, value):
        return isinstance(value, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """Stands for torch.Generator: the device's numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        if torch.device(device).type == "cuda":
            return super().__new__(cls)
        return torch._C.Generator(device)

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        """Where it is said to be."""
        return CUDA


def install():
    """For the rest of the process."""
    cuda, none = torch.cuda, torch.zeros(0, dtype=torch.uint8)
    for name in CALLS:
        setattr(cuda, name, lambda *args: None)
    for name, answer in ANSWERS.items():
        setattr(cuda, name, lambda *args, answer=answer: answer)
    for module in (cuda, cuda.random):
        module.get_rng_state, module.get_rng_state_all = lambda *args: none, lambda: [none]
    cuda.Stream, cuda.Event, cuda.device, cuda.stream = Stream, Event, Block, Block
    cuda.current_stream = Stream
    cuda.CUDAGraph, cuda.graph = graphs.CUDAGraph, graphs.graph
    cuda.is_current_stream_capturing = lambda: graphs.TAPE.recording
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda self, *args: self
    # `.to` must keep a parameter what it is to those who share it, as it does on a device.
    torch.__future__.set_swap_module_params_on_conversion(True)
    backend.devices = lambda: ("cpu", "cuda")
    _interpret_twins()


def _interpret_twins():
    launch = interpreter.GridExecutor.__call__

    def run(executor, *args, **kwargs):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            launch(executor, *args, **kwargs)

    def call(executor, *args, **kwargs):
        LAUNCHED.append(executor.fn.__name__)
        graphs.TAPE.run(run, (executor, *tree_map(inner, args)), tree_map(inner, kwargs))

    interpreter.GridExecutor.__call__ = call
