"""Whole models run on the two backends that are quick on CPU tensors; tests/triton/test_model.py
runs some of the same tests on the third.
"""

import pytest

from llmqat_kernels import use_backend
from tests.conftest import select_backend
from tests.llmqat.training import build_trainer, token_rows


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Both quick backends in turn."""
    with select_backend(request.param):
        yield request.param


@pytest.fixture
def on_reference():
    """The reference backend, for tests whose subject is not the operators."""
    with use_backend("reference"):
        yield


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """The folder of a whole training run: two and a half epochs, with accumulation."""
    folder = tmp_path_factory.mktemp("straight")
    with use_backend("reference"):
        build_trainer(folder, steps=10, data=token_rows(16), gradient_accumulation_steps=2).train()
    return folder
