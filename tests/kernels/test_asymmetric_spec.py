"""Asymmetric min-max: spec 20."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import asymmetric as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator, layouts, special_rows

BITS = tuple(range(2, 9))


def test_hand_written_codes():
    # width 15, scale 1, zero point -5; 2.5 and 3.5 steps are ties to even.
    x = torch.tensor([[-5.0, 10.0, -2.5, -1.5, 0.3]])
    codes, scale, zero = spec.quantize_asymmetric(x, 4)
    assert (scale.tolist(), zero.tolist()) == ([1.0], [-5.0])
    assert codes.tolist() == [[0, 15, 2, 4, 5]]
    assert qk.fake_quantize_asymmetric(x, 4).tolist() == [[-5.0, 10.0, -3.0, -1.0, 0.0]]


def test_zero_need_not_be_a_value():
    x = torch.tensor([[1.0, 4.0, 0.0 + 2.2]])
    assert qk.fake_quantize_asymmetric(x, 2).tolist() == [[1.0, 4.0, 2.0]]


@pytest.mark.parametrize("bits", BITS)
def test_ends_of_the_range_and_half_a_step(bits):
    x = torch.randn(64, 100, generator=generator(1))
    codes, scale, zero = spec.quantize_asymmetric(x, bits)
    assert (codes.amin(-1) == 0).all() and (codes.amax(-1) == spec.levels(bits)).all()
    y = qk.fake_quantize_asymmetric(x, bits)
    assert_same_bits(y.amin(-1), x.amin(-1))
    error = (x.double() - y.double()).abs()
    assert (error <= scale.double().unsqueeze(1) * (0.5 + 1e-4)).all()
    assert torch.equal(zero, x.amin(-1))


def test_a_shifted_row_costs_nothing():
    """The reason for a zero point: one-sided values use all codes."""
    x = torch.rand(32, 64, generator=generator(2)) + 3.0
    own = (qk.fake_quantize_asymmetric(x, 4) - x).abs().mean()
    assert own * 5 < (qk.fake_quantize(x, 4) - x).abs().mean()


def test_constant_rows_are_exact():
    for value in (0.0, 3.7, -1e-30):
        x = torch.full((2, 5), value)
        assert_same_bits(qk.fake_quantize_asymmetric(x, 4), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_rows_never_turn_finite(dtype):
    x = special_rows(33, dtype)
    finite = torch.isfinite(x).all(-1)
    y = qk.fake_quantize_asymmetric(x, 8)
    assert y[~finite].isnan().all() and torch.isfinite(y[finite]).all()
    assert_same_bits(y[finite], qk.fake_quantize_asymmetric(x[finite], 8))
    wide = torch.tensor([[-3e38, 3e38, 0.0]])  # the width is no fp32 number
    assert qk.fake_quantize_asymmetric(wide, 8).isnan().all()


def test_groups_are_rows():
    x = torch.randn(5, 12, generator=generator(3))
    got = qk.fake_quantize_asymmetric(x, 4, group_size=3)
    assert_same_bits(got, qk.fake_quantize_asymmetric(x.reshape(20, 3), 4).reshape(5, 12))


def test_bf16_scale():
    x = torch.randn(50, 20, generator=generator(4))
    codes, scale, _ = spec.quantize_asymmetric(x, 8, -1, True)
    assert_same_bits(scale, scale.to(torch.bfloat16).float())
    assert codes.max() <= 255
    y = qk.fake_quantize_asymmetric(x, 8, scale_dtype=torch.bfloat16)
    assert_same_bits(y, spec.fake_quantize_asymmetric(x, 8, -1, True))


def test_layouts_and_empty():
    x = torch.randn(6, 34, generator=generator(5))
    want = qk.fake_quantize_asymmetric(x, 4)
    for name, view in layouts(x):
        got = qk.fake_quantize_asymmetric(view, 4)
        assert_same_bits(got, want.expand(got.shape), name)
    for shape in ((0, 8), (3, 0)):
        assert qk.fake_quantize_asymmetric(torch.empty(shape), 4).shape == shape


def test_straight_through_gradient():
    x = torch.randn(4, 32, generator=generator(2)).mul_(2).requires_grad_()
    upstream = torch.randn(4, 32, generator=generator(3))
    (qk.fake_quantize_asymmetric(x, 4) * upstream).sum().backward()
    assert_same_bits(x.grad, upstream)
    x.grad = None
    (qk.fake_quantize_asymmetric(x, 4, ste_clip=2.0) * upstream).sum().backward()
    assert_same_bits(x.grad, torch.where(x.detach().abs() < 2.0, upstream, torch.zeros(())))


def test_bad_arguments():
    x = torch.ones(2, 8)
    for change, word in (
        (dict(bits=16), "bits"),
        (dict(group_size=3), "group_size"),
        (dict(ste_clip=0.0), "ste_clip"),
        (dict(scale_dtype=torch.float16), "scale_dtype"),
    ):
        with pytest.raises(qk.InvalidArgument, match=word):
            qk.fake_quantize_asymmetric(x, **({"bits": 4} | change))
