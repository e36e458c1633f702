"""Every test of this folder needs Triton; with TRITON_INTERPRET=0 it also needs a CUDA device."""

from pathlib import Path

import pytest

from llmqat_kernels.backends import triton


def pytest_collection_modifyitems(items):
    reason = triton.why_not()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.triton)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"triton backend: {reason}"))
