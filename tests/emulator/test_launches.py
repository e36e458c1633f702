"""How many kernels the launchers start: what the twin device counts by."""

import pytest
import torch

pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

from tests.kernels import cuda_emulated
from tests.kernels.cuda_cases import cases
from tests.twin.launches import LAUNCHES

pytestmark = pytest.mark.emulator
OF_A_STEP = (
    "quantize", "repacked_matmul", "repacked_matmul_add", "repacked_matmul_silu_mul",
    "repacked_linear", "repacked_linear_add", "integer_group_matmul", "rope_quantize_append",
    "rope_quantize_append_paged", "rope_quantize_append_queries", "attention_decode",
    "attention_decode_paged", "attention_decode_quantize",
)  # fmt: skip
ROWS = 64
"""kLinearTokens: more rows are more launches of a linear."""


def rows(x):
    return x[..., 0].numel()


@pytest.mark.parametrize("op", OF_A_STEP)
def test_launches_of_an_operator(op):
    small = [case for case in cases(op, "cpu", small=True) if 0 < rows(case.args[0]) <= ROWS]
    assert small
    for case in small[:2]:
        cuda_emulated.take_launches()
        with torch.no_grad():
            cuda_emulated.run(op, case)
        assert cuda_emulated.take_launches() == LAUNCHES.get(op, 1)
