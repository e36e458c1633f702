"""The released numerics: spec 23."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import official as spec
from llmqat_kernels.testing import assert_same_bits, generator


def test_hand_written_values():
    x = torch.tensor([[7.0, -3.2, 0.4]])
    got = qk.fake_quantize_official(x, 4)
    # inverted scale 7 / (7 + 1e-6); values code / (inverted + 1e-6)
    torch.testing.assert_close(got, torch.tensor([[7.0, -3.0, 0.0]]), rtol=2e-6, atol=0)
    assert got[0, 0] != 7.0
    x = torch.tensor([[-5.0, 10.0, 0.3]])
    got = qk.fake_quantize_official(x, 4, asymmetric=True)
    torch.testing.assert_close(got, torch.tensor([[-5.0, 10.0, 0.0]]), rtol=1e-6, atol=1e-6)


def test_fp32_is_close_to_the_specification():
    x = torch.randn(64, 256, generator=generator(0))
    codes, _ = spec.official_codes(x, 8)
    own, _ = qk.quantize(x, 8)
    assert (codes != own).float().mean() < 1e-3 and codes.abs().max() == 127


def test_bf16_reaches_code_128():
    x = (torch.randn(2000, 256, generator=generator(1)) * 0.02).to(torch.bfloat16)
    codes, _ = spec.official_codes(x, 8)
    over = (codes.abs() == 128).any(-1).float().mean()
    assert 0.05 < over < 0.3 and codes.abs().max() == 128
    assert qk.quantize(x, 8)[0].abs().max() == 127


def test_values_are_those_of_the_codes_in_the_tensors_dtype():
    x = torch.randn(8, 64, generator=generator(2)).to(torch.bfloat16)
    codes, inverted = spec.official_codes(x, 4)
    assert codes.dtype == torch.bfloat16
    assert_same_bits(qk.fake_quantize_official(x, 4), codes / (inverted + 1e-6))


def test_16_bits_are_quantized():
    x = torch.randn(64, 512, generator=generator(3)).to(torch.bfloat16)
    y = qk.fake_quantize_official(x, 16)
    changed = (y != x).float().mean()
    assert 0.02 < changed < 0.5
    assert ((y - x).abs() <= x.abs() * 0.01 + 1e-3).all()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradient_is_cut_at_two(asymmetric):
    x = torch.randn(4, 32, generator=generator(4)).mul_(2).requires_grad_()
    qk.fake_quantize_official(x, 8, asymmetric=asymmetric).sum().backward()
    assert_same_bits(x.grad, (x.detach().abs() < 2).float())
    x.grad = None
    qk.fake_quantize_official(x, 8, asymmetric=asymmetric, ste_clip=None).sum().backward()
    assert (x.grad == 1).all()


def test_small_constants_keep_zero_rows_finite_but_not_in_fp16():
    for asymmetric in (False, True):
        zeros = torch.zeros(2, 4)
        assert (qk.fake_quantize_official(zeros, 8, asymmetric=asymmetric) == 0).all()
        half = qk.fake_quantize_official(zeros.half(), 8, asymmetric=True)
        assert half.isnan().all()
    assert qk.fake_quantize_official(torch.empty(0, 4), 8).shape == (0, 4)


def test_statsq_by_hand():
    """Weights of 2 bits: s = 2 x mean|w| = 4, values s / 4 times -3, -1, 1, 3; no zero."""
    x = torch.tensor([[4.0, -2.0, 1.0, 1.0], [8.0, -8.0, -0.0, 0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        got = qk.fake_quantize_official(x.to(dtype), 2, statsq=True)
        # -2 / 4 lies between two values, -1 and -3: half to even takes the outer one.
        want = [[3.0, -3.0, 1.0, 1.0], [6.0, -6.0, -2.0, -2.0]]
        assert got.dtype == dtype and got[0].tolist() == want[0]
        assert got[1, :2].tolist() == want[1][:2] and got[1, 2:].abs().tolist() == [2.0, 2.0]
    assert qk.fake_quantize_official(torch.zeros(1, 4), 2, statsq=True).isnan().all()
    assert qk.fake_quantize_official(torch.empty(0, 4), 2, statsq=True).shape == (0, 4)


def test_statsq_is_the_clipped_quantizer_in_the_tensors_dtype():
    x = torch.randn(64, 256, generator=generator(5))
    own = qk.fake_quantize_statsq(x, 2)
    got = qk.fake_quantize_official(x, 2, statsq=True)
    torch.testing.assert_close(got, own, rtol=1e-6, atol=0)
    narrow = x.to(torch.bfloat16)
    mean = narrow.abs().float().mean(-1, keepdim=True).to(torch.bfloat16)
    values = qk.fake_quantize_official(narrow, 2, statsq=True) / (2 * mean)
    assert set(values.float().mul(4).round().unique().tolist()) == {-3.0, -1.0, 1.0, 3.0}


def test_statsq_has_no_gradient_where_it_clips():
    x = torch.randn(4, 32, generator=generator(6)).mul_(2).requires_grad_()
    outside = x.detach() / (2 * x.detach().abs().mean(-1, keepdim=True))
    inside = (outside.abs() < 0.99).float()
    qk.fake_quantize_official(x, 2, statsq=True, ste_clip=None).sum().backward()
    assert_same_bits(x.grad, inside)
    x.grad = None
    qk.fake_quantize_official(x, 2, statsq=True, ste_clip=1.0).sum().backward()
    assert_same_bits(x.grad, inside * (x.detach().abs() < 1).float())


def test_bad_arguments():
    with pytest.raises(qk.InvalidArgument, match="bits"):
        qk.fake_quantize_official(torch.ones(2, 8), 12)
    with pytest.raises(qk.InvalidArgument, match="statsq"):
        qk.fake_quantize_official(torch.ones(2, 8), 2, asymmetric=True, statsq=True)
