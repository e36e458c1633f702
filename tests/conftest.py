"""Shared fixtures. The environment is set before torch loads its OpenMP runtime."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from llmqat_kernels import native, use_backend

torch.set_num_threads(1)

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every CPU-side backend in turn; a missing one is a skip that says why."""
    name = request.param
    if name == "cpu" and not native.is_available():
        pytest.skip(f"cpu backend: {native.why_not()}")
    with use_backend(name):
        yield name


@pytest.fixture(params=["scalar", "avx2", "avx512vnni"])
def isa(request):
    """Every instruction set this processor has, on the cpu backend."""
    if not native.is_available():
        pytest.skip(f"cpu backend: {native.why_not()}")
    if request.param not in native.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    with use_backend("cpu"), native.set_isa(request.param):
        yield request.param
