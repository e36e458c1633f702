"""The CUDA linear with float activations, on the CPU: within the 2x rule of spec 7, and the bits of
a row do not depend on the others."""

import ctypes

import pytest
import torch

from llmqat_kernels.spec import activation
from llmqat_kernels.testing import assert_same_bits, assert_within_ratio, generator
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.linear import Problem, case, layout, run

pytestmark = pytest.mark.emulator


@pytest.fixture(scope="module")
def kernels():
    return compile_kernel("float_linear")


# m, n, k, multiprocessors: every token tile with tails, splits (one of an odd number of stages),
# rows that are no multiple of 16 bytes, two launches.
SHAPES = [
    (1, 40, 2100, 1),
    (9, 34, 70, 1),
    (20, 150, 2088, 3),
    (33, 260, 300, 2),
    (66, 20, 1027, 1),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n, k, sms", SHAPES)
def test_float_linear_follows_the_ratio_rule(kernels, dtype, m, n, k, sms, schedule):
    kernels.use_schedule(schedule)
    _, _, w, sw = case(m, n, k, 4)
    x = torch.randn(m, k, generator=generator(m)).to(dtype)
    bias = torch.randn(n, generator=generator(5)).to(dtype)
    packed, options = layout(w, True), {"nibbles": True, "sms": sms, "bias": bias}
    got = run(kernels, x, None, packed, sw, dtype, **options)
    dense = (w.float() * sw[:, None]).to(dtype)
    exact = x.double() @ (w.double() * sw.double()[:, None]).T + bias.double()
    plain = (x.float() @ dense.float().T + bias.float()).to(dtype)
    assert_within_ratio(got, plain, exact)
    one = run(kernels, x[:1].contiguous(), None, packed, sw, dtype, **options)
    assert_same_bits(one, got[:1], "a row of a smaller batch")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float_linear_is_exact_on_small_integers(kernels, schedule):
    """Every code meets every place of the fragments: sums below 2^24 have no rounding."""
    kernels.use_schedule(schedule)
    for dtype, m in ((torch.bfloat16, 64), (torch.float16, 8), (torch.float16, 17)):
        _, _, w, _ = case(m, 70, 280, 4)
        x = torch.randint(-8, 9, (m, 280), generator=generator(6)).to(dtype)
        got = run(kernels, x, None, layout(w, True), torch.ones(70), dtype, nibbles=True)
        assert_same_bits(got, (x.double() @ w.double().T).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_schedule_changes_the_bits_of_split_sums(kernels, dtype):
    """Parts are added in the order of the splits, whoever comes last."""
    _, _, w, sw = case(3, 40, 4200, 4)
    x = torch.randn(3, 4200, generator=generator(8)).to(dtype)
    packed, results = layout(w, True), []
    for schedule in SCHEDULES:
        kernels.use_schedule(schedule)
        results.append(run(kernels, x, None, packed, sw, dtype, nibbles=True, sms=2))
    for got in results[1:]:
        assert_same_bits(got, results[0])


def test_gate_and_up_finish_as_silu_mul(kernels):
    kernels.use_schedule("lagging")
    _, _, w, _ = case(5, 46, 300, 4)
    x = torch.randint(-3, 4, (5, 300), generator=generator(7)).to(torch.bfloat16)
    packed, sw = layout(w, True), torch.full((46,), 0.0078125)
    got = run(kernels, x, None, packed, sw, torch.bfloat16, nibbles=True, silu_mul=True)
    y = (x.double() @ w.double().T * 0.0078125).to(torch.bfloat16)
    assert_same_bits(got, activation.silu_mul(y[:, :23], y[:, 23:]))


def test_refused(kernels):
    empty = Problem(m=0, n=3, k=4, sms=1)
    assert kernels.llmqat_cuda_float_linear(ctypes.byref(empty), None) == 0
    for options in ({"dtype": 0, "nibbles": True}, {"dtype": 1, "nibbles": False}):
        problem = Problem(m=1, n=1, k=4, sms=1, **options)
        assert kernels.llmqat_cuda_float_linear(ctypes.byref(problem), None) != 0
