"""exp, log and tree_sum of the specification: spec 11 and 13."""

import math

import pytest
import torch

from llmqat_kernels.spec.math import exp, log, tree_sum
from llmqat_kernels.testing import generator

INF, NAN = float("inf"), float("nan")


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the last place of the rounded exact value."""
    rounded = exact.to(torch.float32)
    above = torch.nextafter(rounded.abs(), torch.tensor(INF)).double()
    return ((actual.double() - exact).abs() / (above - rounded.abs().double())).max().item()


@pytest.mark.parametrize("low, high", [(-87, 88), (-1, 1), (-1e-3, 1e-3), (-20, 0)])
def test_exp_is_accurate(low, high):
    x = torch.linspace(low, high, 300_001)
    assert ulps(exp(x), torch.exp(x.double())) <= 2


def test_exp_at_the_edges():
    x = torch.tensor([0.0, -0.0, -87.1, -INF, 88.1, 3e38, INF])
    assert exp(x).tolist() == [1, 1, 0, 0, INF, INF, INF]
    assert exp(torch.tensor([NAN])).isnan().all()
    assert exp(torch.tensor([-87.0])).item() >= 2.0**-126  # never a subnormal
    assert exp(torch.tensor([88.0])).isfinite().all()


def test_exp_is_monotonic_across_exponents():
    for n in range(-120, 126):
        middle = torch.tensor((n + 0.5) * math.log(2))
        steps = torch.arange(-50, 51, dtype=torch.int32)
        x = (middle.view(torch.int32) + steps).view(torch.float32).sort().values
        assert (exp(x).diff() >= -exp(x)[:-1] * 2.0**-22).all()


def test_log_is_accurate():
    bits = torch.randint(
        0x00800000, 0x7F800000, (300_000,), dtype=torch.int32, generator=generator(0)
    )
    x = bits.view(torch.float32)
    assert ulps(log(x), torch.log(x.double())) <= 2
    for low, high in ((0.5, 2.0), (0.999, 1.001)):
        x = torch.linspace(low, high, 300_000)
        assert ulps(log(x), torch.log(x.double())) <= 2


def test_log_of_uniforms_near_one():
    x = 1 - torch.arange(1, 100_001) * 2.0**-24
    assert ulps(log(x), torch.log(x.double())) <= 2
    want = torch.tensor([0.0, -24 * math.log(2), math.log(2)])
    assert torch.allclose(log(torch.tensor([1.0, 2.0**-24, 2.0])), want, rtol=1e-7, atol=0)


def test_tree_sum_order_is_halves():
    big = 2.0**24
    # (x0 + x2) + (x1 + x3), not left to right.
    assert tree_sum(torch.tensor([big, 1.0, -big, 1.0])).item() == 2.0
    assert tree_sum(torch.tensor([big, 1.0, 1.0, -big])).item() == (big + 1 + (1 - big)) - 1


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8, 31, 576, 1000])
def test_tree_sum_of_integers_is_exact(length):
    x = torch.randint(-100, 100, (4, length), generator=generator(length)).float()
    assert torch.equal(tree_sum(x), x.double().sum(-1).float())
