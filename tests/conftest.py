"""Shared fixtures. The environment is set before torch loads its OpenMP runtime."""

import gc
import os
import zlib

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton reads it when a kernel is defined; `make test-gpu` sets 0 and runs the compiled kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process of the trainer takes one GPU

import pytest
import torch

from llmqat_kernels import native, use_backend
from llmqat_kernels.backends import triton

torch.set_num_threads(1)
# Half a million objects of imported modules stay to the end. That no collection of garbage looks at
# them, neither while they are made nor later, saves a fifth of the time of the tests.
gc.disable()

BACKENDS = ["reference", "cpu", "triton"]


def pytest_addoption(parser):
    parser.addoption(
        "--one-in",
        type=int,
        default=1,
        metavar="N",
        help="of the cases of each parametrized test run the first, and one in N of the others",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """No file may change, when it is imported, whether the kernels of all others are compiled."""
    mode = os.environ["TRITON_INTERPRET"]
    try:
        result = yield
        if os.environ["TRITON_INTERPRET"] != mode:
            raise pytest.UsageError("a file of tests sets TRITON_INTERPRET when it is imported")
        return result
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """What ``--one-in`` leaves out is the same in every run: a hash of the name decides."""
    share, seen, kept, left = config.getoption("--one-in"), set(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        chosen = test not in seen or zlib.crc32(item.nodeid.encode()) % share == 0
        (kept if chosen else left).append(item)
        seen.add(test)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def select_backend(name):
    """``use_backend(name)``; a backend that cannot run on CPU tensors is a skip that says why."""
    if name == "cpu" and not native.is_available():
        pytest.skip(f"cpu backend: {native.why_not()}")
    if name == "triton" and "cpu" not in triton.devices():
        pytest.skip("TRITON_INTERPRET=0: no Triton on CPU tensors; tests/device has whole models")
    if name == "triton" and triton.why_not():
        pytest.skip(f"triton backend: {triton.why_not()}")
    return use_backend(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend in turn, on CPU tensors."""
    with select_backend(request.param):
        yield request.param


@pytest.fixture(params=["scalar", "avx2", "avx512vnni"])
def isa(request):
    """Every instruction set this processor has, on the cpu backend."""
    if not native.is_available():
        pytest.skip(f"cpu backend: {native.why_not()}")
    if request.param not in native.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    with use_backend("cpu"), native.set_isa(request.param):
        yield request.param
