"""Where a flow runs: a device that torch calls ``cuda``. `tests/twin/flows.py` derives the other
place from this one. A place has these members:

* ``device()``: a context in which tensors of ``cuda`` may be used.
* ``size``: of tiny models (``tiny_llama``); ``length``: of sequences; ``steps``: of a training;
  ``seeds``: of random cases.
* ``exact``: whether float arithmetic is that of the CPU.
* ``ran``: names of the Triton kernels and native operators that ran; ``replays``: of graphs.
* ``compiled(function)``: by ``torch.compile`` where the place has a compiler.
* ``require_native()``: ends the flow where the library has no CUDA C++ kernels.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import MappingProxyType

import pytest
import torch

from llmqat_kernels import dispatch, native
from llmqat_kernels.backends import triton


def replace_launch(monkeypatch, wrapped):
    """Put `wrapped(launch)` in the place of `launch` in every file of Triton kernels."""
    for name in triton.MODULES:
        module = importlib.import_module(f"{triton.__name__}.{name}")
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", wrapped(module.launch))


class Cuda:
    """A real device. Until ``monkeypatch`` is undone, what runs there is noted."""

    device = nullcontext
    size = MappingProxyType(
        {"heads": 2, "kv_heads": 1, "head_dim": 64, "intermediate": 192, "layers": 2}
    )
    length, steps, seeds = 16, 20, 8
    exact = False

    def __init__(self, monkeypatch):
        self.ran, self.replays = set(), 0
        replace_launch(monkeypatch, self._noting_launches)
        monkeypatch.setattr(dispatch, "call", self._noting_operators(dispatch.call))
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", self._noting_replays(replay))

    def compiled(self, function):
        """No break of the graph is taken; one process, since the tests fill the processors."""
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, options={"compile_threads": 1})

    def require_native(self):
        """A skip that says why."""
        if not native.build_info().get("cuda"):
            pytest.skip("the native library was built without CUDA")

    def _noting_launches(self, launch):
        def noted(kernel, *args, **options):
            self.ran.add(kernel.fn.__name__)
            return launch(kernel, *args, **options)

        return noted

    def _noting_operators(self, call):
        def noted(op, args):
            choice = dispatch.resolve(op, args[0].device.type, dispatch.current_backend())
            if choice.backend == "cuda":
                self.ran.add(f"llmqat_cuda::{op}")
            return call(op, args)

        return noted

    def _noting_replays(self, replay):
        def noted(graph):
            self.replays += 1
            return replay(graph)

        return noted
