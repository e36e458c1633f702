"""The flows of `tests/device` on the twin device, and whether the twin is strict.

    python -m tests.twin.flows DEVICE.so [FLOW ...]

DEVICE.so is device.cpp, compiled. Prints a line of JSON for each flow: its name, the error or null,
and the seconds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from functools import partial
from types import MappingProxyType

if __name__ == "__main__":  # before torch looks for a device, and in no process of other tests
    os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ctypes.CDLL(sys.argv[1])
    gc.disable()  # as in tests/conftest.py

import pytest
import torch

import llmqat_kernels as qk
from tests.device import flows
from tests.device.place import Cuda
from tests.twin import cuda, graphs, tensors
from tests.twin.launch_counts import launches_of_a_block_by_cuda


class Twin(Cuda):
    """The place of the other flows: a device, small and slow, that computes as the CPU does."""

    device = staticmethod(tensors.device)
    size = MappingProxyType(
        {"heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate": 48, "layers": 1}
    )
    length, steps, seeds = 8, 2, 8
    exact = True

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.ran = tensors.RAN  # where the twin writes which native operators it stood in for

    def compiled(self, function):
        """The function itself: there is no compiler for the twin."""
        return function

    def require_native(self):
        """The reference stands in for the library's kernels."""


def on_twin(function):
    """A flow of `tests/device` there."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        function(Twin(monkeypatch))


FLOWS = {name: partial(on_twin, function) for name, function in flows.FLOWS.items()}


def flow(function):
    """Add a flow of the twin alone: is it strict?"""
    FLOWS[function.__name__] = function
    return function


@flow
def two_devices_do_not_mix():
    with tensors.device():
        x = torch.ones(3, device="cuda")
        assert x.is_cuda and x.device == tensors.CUDA and (x + 1).device == x.device
        assert type(x.cpu()) is torch.Tensor and (x * torch.tensor(2.0)).tolist() == [2.0] * 3
        for mix in (lambda: x + torch.ones(3), lambda: torch.ops.llmqat.int_matmul(*codes(x))):
            try:
                mix()
            except RuntimeError as error:
                assert "on the CPU" in str(error)
            else:
                raise AssertionError("operands on two devices were taken")


def codes(x):
    """Codes of activations on the device, of a weight on the CPU."""
    return qk.quantize(x[None], 8)[0], torch.ones(4, 3, dtype=torch.int8), 8


@flow
def a_capture_computes_nothing_and_refuses_to_wait():
    with tensors.device():
        x, taken = torch.zeros(2, device="cuda"), graphs.CUDAGraph()
        with graphs.graph(taken):
            x.add_(1)
        assert x.tolist() == [0, 0]
        taken.replay()
        taken.replay()
        assert x.tolist() == [2, 2]
        try:
            with graphs.graph(taken):
                float(x[0])
        except RuntimeError as error:
            assert "while a graph is captured" in str(error)
        else:
            raise AssertionError("a captured value was read")


flow(launches_of_a_block_by_cuda)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)
    cuda.install()
    for name in sys.argv[2:] or FLOWS:
        error = None
        tensors.RAN.clear()
        started = time.perf_counter()
        try:
            FLOWS[name]()
        except BaseException:  # SystemExit of a command too
            error = traceback.format_exc()
        seconds = round(time.perf_counter() - started, 1)
        line = json.dumps({"flow": name, "error": error, "seconds": seconds})
        print(line, flush=True)
