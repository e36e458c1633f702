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


def test_bad_arguments():
    with pytest.raises(qk.InvalidArgument, match="bits"):
        qk.fake_quantize_official(torch.ones(2, 8), 12)
