"""Whole runs on a CUDA device; `tests/twin` runs the same flows where there is none."""

import pytest
import torch

from llmqat_kernels.backends import triton
from tests.device.flows import FLOWS
from tests.device.place import Cuda

REASON = "" if torch.cuda.is_available() else "needs a CUDA device"
if triton.interpreting() and not REASON:
    REASON = "TRITON_INTERPRET=1: kernels are not compiled; use make test-gpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(REASON), reason=f"{REASON}; tests/twin runs the same flows"),
]


@pytest.mark.parametrize("flow", FLOWS)
def test_flow(flow, monkeypatch):
    FLOWS[flow](Cuda(monkeypatch))
