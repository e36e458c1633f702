"""rms_norm, rms_norm_quantize and the training form: spec 12, and every backend against it."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import norm as spec
from llmqat_kernels.spec.quantize import quantize
from llmqat_kernels.testing import (
    DTYPES,
    ROW_LENGTHS,
    assert_same_bits,
    assert_within_ratio,
    generator,
    layouts,
    special_rows,
)

native = torch.ops.llmqat_cpu
EPS = 1e-5


def weight(columns, dtype=torch.float32):
    return (torch.randn(columns, generator=generator(columns + 1)) + 1).to(dtype)


def test_hand_written_numbers():
    # Squares 9 + 16 = 25, mean 12.5, eps makes 16, r = 1/4.
    y = spec.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.5]), 3.5)
    assert y.tolist() == [[1.5, 0.5]]
    codes, scale, total = spec.rms_norm_quantize(
        torch.tensor([[1.0, 1.0]]), torch.tensor([2.0, 0.5]), 3.5, 4, torch.tensor([[2.0, 3.0]])
    )
    assert total.tolist() == [[3.0, 4.0]]
    assert (
        codes.tolist() == [[7, 2]]
        and scale.item() == torch.div(torch.tensor(1.5), torch.tensor(7.0)).item()
    )


@pytest.mark.parametrize("columns", [1, 7, 576, 2048])
def test_against_float64(columns):
    x, w = torch.randn(50, columns, generator=generator(2)), weight(columns)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()
    assert torch.allclose(spec.rms_norm(x, w, EPS).double(), exact, rtol=1e-6, atol=1e-9)


def test_residual_is_rounded_before_the_norm():
    x, r = torch.randn(2, 8, 64, generator=generator(3)).to(torch.bfloat16)
    w = weight(64, torch.bfloat16)
    codes, scale, total = spec.rms_norm_quantize(x, w, EPS, 8, r)
    assert_same_bits(total, x + r)
    plain_codes, plain_scale, nothing = spec.rms_norm_quantize(total, w, EPS, 8)
    assert nothing.shape == (0,)
    assert_same_bits(codes, plain_codes)
    assert_same_bits(scale, plain_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", ROW_LENGTHS)
def test_native_equals_spec(isa, dtype, columns):
    x, residual = special_rows(columns, dtype), special_rows(columns, dtype).flip(0)
    for w in (weight(columns, dtype), weight(columns)):
        assert_same_bits(native.rms_norm(x, w, EPS), spec.rms_norm(x, w, EPS))
        for bits in (8, 4):
            for add in (None, residual):
                got = native.rms_norm_quantize(x, w, EPS, bits, add)
                for a, b in zip(got, spec.rms_norm_quantize(x, w, EPS, bits, add), strict=True):
                    assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_training_form_is_the_inference_form_with_values(backend, dtype, add):
    x, w = special_rows(33, dtype), weight(33, dtype)
    residual = x.flip(0) if add else None
    y, codes, scale, total = qk.rms_norm_quantize_train(x, w, EPS, 6, residual=residual)
    want = qk.rms_norm_quantize(x, w, EPS, 6, residual=residual)
    for a, b in zip((codes, scale, total), want, strict=True):
        assert_same_bits(a, b)
    assert_same_bits(y, spec.rms_norm(total, w, EPS))
    want_codes, want_scale = quantize(y, 6)
    assert_same_bits(codes, want_codes)
    assert_same_bits(scale, want_scale)
    handle, *rest = qk.rms_norm_quantize_train(x, w, EPS, 6, residual=residual, values=False)
    assert handle.shape == x.shape and handle.dtype == x.dtype and handle.isnan().all()
    assert handle.untyped_storage().nbytes() == x.element_size()
    for a, b in zip(rest, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("values", [False, True])
def test_gradients_against_float64(backend, values):
    """d/dx, d/dresidual and d/dweight of a function of y and of the sum, by plain torch in fp64."""
    leaves = [torch.randn(6, 40, generator=generator(i)) for i in (1, 2)] + [weight(40)]
    upstream = [torch.randn(6, 40, generator=generator(i)) for i in (3, 4)]

    def gradients(dtype, function):
        x, residual, w = (t.to(dtype).requires_grad_() for t in leaves)
        y, total = function(x, residual, w)
        return torch.autograd.grad((y, total), (x, residual, w), [g.to(dtype) for g in upstream])

    def plain(x, residual, w):
        total = x + residual
        return torch.nn.functional.rms_norm(total, (40,), w, EPS), total

    def ours(x, residual, w):
        y, _, _, total = qk.rms_norm_quantize_train(x, w, EPS, 8, residual=residual, values=values)
        return y, total

    exact = gradients(torch.float64, plain)
    baseline = gradients(torch.float32, plain)
    for got, base, want in zip(gradients(torch.float32, ours), baseline, exact, strict=True):
        assert_within_ratio(got, base, want, 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_spec_on_many_rows(isa, dtype):
    x = (torch.randn(400, 576, generator=generator(5)) * 3).to(dtype)
    for a, b in zip(
        native.rms_norm_quantize(x, weight(576), 1e-6, 8, x.flip(0)),
        spec.rms_norm_quantize(x, weight(576), 1e-6, 8, x.flip(0)),
        strict=True,
    ):
        assert_same_bits(a, b)


def test_layouts(isa):
    x = torch.randn(5, 24, generator=generator(6))
    for name, view in layouts(x):
        for a, b in zip(
            native.rms_norm_quantize(view, weight(24), EPS, 8, view),
            spec.rms_norm_quantize(x, weight(24), EPS, 8, x),
            strict=True,
        ):
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(isa, shape):
    x = torch.zeros(shape)
    codes, scale, _ = native.rms_norm_quantize(x, torch.ones(shape[-1]), EPS, 8)
    assert codes.shape == x.shape and scale.shape == x.shape[:-1] and (scale == 1).all()


def test_bad_arguments_name_the_argument(isa):
    x = torch.zeros(2, 8)
    for message, call in {
        "weight": lambda: native.rms_norm(x, torch.ones(7), EPS),
        "bits": lambda: native.rms_norm_quantize(x, torch.ones(8), EPS, 9),
        "residual": lambda: native.rms_norm_quantize(x, torch.ones(8), EPS, 8, torch.zeros(2, 7)),
        "x": lambda: native.rms_norm(x.double(), torch.ones(8), EPS),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
