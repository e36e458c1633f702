"""fake_quantize_channels on Triton against the specification, with guard bands."""

import pytest
import torch

from llmqat_kernels.spec import channels as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator, special_rows

from .device import run
from .guard import guard_bands, poisoned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group_size"), [(6, 1), (129, 3), (256, 4)])
def test_guarded(dtype, columns, group_size):
    x = special_rows(columns, dtype)
    for rows in (x, x[:5]):
        with guard_bands():
            y = run("fake_quantize_channels", poisoned(rows), 4, group_size)
        assert_same_bits(y, spec.fake_quantize_channels(rows, 4, group_size))


def test_more_rows_than_one_program_has():
    x = torch.randn(2 * 128 + 3, 5, generator=generator(0))
    x[-1, 2] = 1e4
    with guard_bands():
        y = run("fake_quantize_channels", poisoned(x), 8, 1)
    assert_same_bits(y, spec.fake_quantize_channels(x, 8, 1))
