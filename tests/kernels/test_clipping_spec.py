"""StatsQ and LSQ: spec 21, 22."""

import math

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import clipping as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator, special_rows

BITS = tuple(range(2, 9))


def test_statsq_hand_written_values():
    # mean |x| = 0.5, s = 1; two bits: levels at -3/4, -1/4, 1/4, 3/4 of s.
    x = torch.tensor([[0.3, -0.1, 1.0, -0.6, 0.5, 0.5]])
    assert qk.fake_quantize_statsq(x, 2).tolist() == [[0.25, -0.25, 0.75, -0.75, 0.25, 0.25]]


@pytest.mark.parametrize("bits", BITS)
def test_statsq_levels(bits):
    x = torch.randn(8, 4096, generator=generator(0)) * 0.02
    y = qk.fake_quantize_statsq(x, bits)
    scale = spec.statsq_scale(x)
    half = 2 ** (bits - 1)
    code = y.double() / scale.double().unsqueeze(1) * half - 0.5
    assert (code - code.round()).abs().max() < 1e-4
    assert code.round().min() >= -half and code.round().max() <= half - 1
    assert (y != 0).all()
    assert len(y[0].unique()) <= 2**bits


def test_statsq_range_is_twice_the_mean_and_clips():
    x = torch.randn(16, 1000, generator=generator(1))
    scale = spec.statsq_scale(x)
    torch.testing.assert_close(scale, 2 * x.abs().mean(-1), rtol=1e-5, atol=0)
    y = qk.fake_quantize_statsq(x, 4)
    assert (y.abs() <= scale.unsqueeze(1)).all()
    assert (x.abs() > scale.unsqueeze(1)).any()


def test_statsq_special_rows_and_groups():
    x = special_rows(33, torch.float32)
    finite = torch.isfinite(x).all(-1)
    y = qk.fake_quantize_statsq(x, 4)
    assert y[~finite].isnan().all() and torch.isfinite(y[finite]).all()
    assert (qk.fake_quantize_statsq(torch.zeros(2, 4), 4) == 0).all()
    x = torch.randn(5, 12, generator=generator(3))
    got = qk.fake_quantize_statsq(x, 4, group_size=3, scale_dtype=torch.bfloat16)
    want = qk.fake_quantize_statsq(x.reshape(20, 3), 4, scale_dtype=torch.bfloat16)
    assert_same_bits(got, want.reshape(5, 12))


def test_statsq_gradient_stops_where_weights_are_clipped():
    x = torch.randn(4, 64, generator=generator(2)).requires_grad_()
    upstream = torch.randn(4, 64, generator=generator(3))
    (qk.fake_quantize_statsq(x, 4) * upstream).sum().backward()
    inside = x.detach().abs() < 0.99 * spec.statsq_scale(x.detach()).unsqueeze(1)
    assert not inside.all()
    assert_same_bits(x.grad, torch.where(inside, upstream, torch.zeros(())))
    x.grad = None
    (qk.fake_quantize_statsq(x, 4, ste_clip=0.5) * upstream).sum().backward()
    inside &= x.detach().abs() < 0.5
    assert_same_bits(x.grad, torch.where(inside, upstream, torch.zeros(())))


def test_lsq_hand_written_values():
    x = torch.tensor([0.24, 0.25, 0.75, -0.8, 9.0, -9.0, 3.4])
    y = qk.fake_quantize_lsq(x, torch.tensor([0.5]), 4)
    assert y.tolist() == [0.0, 0.0, 1.0, -1.0, 3.5, -4.0, 3.5]


def test_lsq_gradients_by_hand():
    scale = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([0.6, 9.0, -9.0, 3.5], requires_grad=True)
    (qk.fake_quantize_lsq(x, scale, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0, 0.0]  # 3.5 is the last code itself: not inside
    want = (1.0 * (1 - 1.2) + 2.0 * 7 + 3.0 * -8 + 4.0 * 7) / math.sqrt(4 * 7)
    assert scale.grad.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_scale_gradient_is_the_derivative_between_ties(bits):
    """Inside and outside the range: autograd through a straight-through round says the same."""
    x = torch.randn(7, 9, generator=generator(4), dtype=torch.float64) * 3
    scale = torch.tensor([0.37], dtype=torch.float64, requires_grad=True)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = (x / scale).clamp(low, high)
    y = (v + (v.round() - v).detach()) * scale
    upstream = torch.randn(7, 9, generator=generator(5), dtype=torch.float64)
    (y * upstream).sum().backward()
    own = scale.detach().float().requires_grad_()
    (qk.fake_quantize_lsq(x.float(), own, bits) * upstream.float()).sum().backward()
    assert own.grad.item() * math.sqrt(63 * high) == pytest.approx(scale.grad.item(), rel=1e-3)


def test_lsq_scale_rule():
    x = torch.randn(3, 40, generator=generator(6))
    scale = qk.lsq_scale(x, 8)
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(127), rel=1e-6)
    assert qk.lsq_scale(torch.zeros(3), 4).item() == 1.0
    assert qk.lsq_scale(torch.tensor([1.0, float("inf")]), 4).isnan().all()
    assert qk.lsq_scale(x.bfloat16(), 4).dtype == torch.float32


def test_lsq_never_turns_finite_and_floors_its_scale():
    x = torch.tensor([1.0, float("inf"), float("nan"), -float("inf")])
    y = qk.fake_quantize_lsq(x, torch.tensor([0.1]), 4)
    assert y.isnan().tolist() == [False, True, True, True]
    negative = torch.tensor([-1.0], requires_grad=True)
    y = qk.fake_quantize_lsq(torch.tensor([1.0]), negative, 4)
    assert y.item() == 7 * spec.LSQ_MIN_SCALE
    y.backward()
    assert negative.grad.item() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_shapes_and_autocast(dtype):
    x = torch.randn(2, 3, 8, generator=generator(7)).to(dtype)
    scale = torch.tensor([0.2])
    for call in (
        lambda: qk.fake_quantize_lsq(x, scale, 4),
        lambda: qk.fake_quantize_statsq(x, 4),
        lambda: qk.fake_quantize_asymmetric(x, 4),
        lambda: qk.fake_quantize_official(x, 4),
    ):
        y = call()
        assert y.dtype == dtype and y.shape == x.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(call(), y)


def test_bad_arguments():
    x = torch.ones(2, 8)
    with pytest.raises(qk.InvalidArgument, match="scale"):
        qk.fake_quantize_lsq(x, torch.ones(2), 4)
    with pytest.raises(qk.InvalidArgumentType, match="scale"):
        qk.fake_quantize_lsq(x, torch.ones(1).bfloat16(), 4)
    with pytest.raises(qk.InvalidArgument, match="bits"):
        qk.fake_quantize_lsq(x, torch.ones(1), 1)
    with pytest.raises(qk.InvalidArgument, match="bits"):
        qk.fake_quantize_statsq(x, 9)


def test_operators_pass_opcheck_and_compile_to_the_same_bits():
    ops = torch.ops.llmqat
    x = torch.randn(3, 16, requires_grad=True)
    scale = torch.tensor([0.2], requires_grad=True)
    for op, args in (
        (ops.fake_quantize_asymmetric, (x, 4, 8, 1.0, True)),
        (ops.fake_quantize_statsq, (x, 4, -1, None, False)),
        (ops.fake_quantize_lsq, (x, scale, 4, 1.0)),
        (ops.fake_quantize_official, (x, 8, True, 2.0)),
        (ops.fake_quantize_official, (x, 2, False, 2.0, True)),
    ):
        torch.library.opcheck(op.default, args)

    def step(x, scale):
        y = qk.fake_quantize_asymmetric(qk.fake_quantize_lsq(x, scale, 8), 4)
        return qk.fake_quantize_statsq(qk.fake_quantize_official(y, 8), 4).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, scale), (x, scale))
    for a, b in zip(got, torch.autograd.grad(step(x, scale), (x, scale)), strict=True):
        assert_same_bits(a, b)
