"""Whole models run on the two backends that are quick on CPU tensors; tests/triton/test_model.py
runs some of the same tests on the third.
"""

import pytest

from tests.conftest import select_backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Both quick backends in turn."""
    with select_backend(request.param):
        yield request.param
