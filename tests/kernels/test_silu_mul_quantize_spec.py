"""silu_mul, silu_mul_quantize and the training form: spec 14, and every backend against it."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import activation as spec
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
INF, NAN = float("inf"), float("nan")


def test_hand_written_numbers():
    y = spec.silu_mul(
        torch.tensor([0.0, 100.0, -100.0, -3e38, 3e38]), torch.tensor([5.0, 0.5, 2.0, 1.0, 1.0])
    )
    assert y.tolist() == [0.0, 50.0, 0.0, 0.0, torch.tensor(3e38).item()]


def test_infinities_and_nan_follow_plain_torch():
    gate = torch.tensor([INF, -INF, NAN, 1.0, 0.0])
    up = torch.tensor([1.0, 1.0, 1.0, NAN, INF])
    assert_same_bits(
        spec.silu_mul(gate, up).isfinite(), (torch.nn.functional.silu(gate) * up).isfinite()
    )
    assert spec.silu_mul(gate, up)[0].item() == INF


def test_against_float64():
    gate = torch.linspace(-100, 100, 200_001)
    exact = torch.nn.functional.silu(gate.double())
    y = spec.silu_mul(gate, torch.ones_like(gate))
    assert torch.allclose(y.double(), exact, rtol=4e-7, atol=1e-35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_silu_before_the_product(dtype):
    gate, up = torch.randn(2, 4, 99, generator=generator(1)).to(dtype)
    silu = spec.silu_mul(gate, torch.ones_like(up))
    assert_same_bits(spec.silu_mul(gate, up), silu * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", ROW_LENGTHS)
def test_native_equals_spec(isa, dtype, columns):
    gate, up = special_rows(columns, dtype), special_rows(columns, dtype).flip(0)
    assert_same_bits(native.silu_mul(gate, up), spec.silu_mul(gate, up))
    for bits in (8, 4):
        got, want = (f(gate, up, bits) for f in (native.silu_mul_quantize, spec.silu_mul_quantize))
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_form_is_the_inference_form_with_values(backend, dtype):
    gate, up = special_rows(33, dtype), special_rows(33, dtype).flip(0)
    want = qk.silu_mul_quantize(gate, up, 6)
    y, *codes = qk.silu_mul_quantize_train(gate, up, 6)
    assert_same_bits(y, spec.silu_mul(gate, up))
    handle, *codes_alone = qk.silu_mul_quantize_train(gate, up, 6, values=False)
    assert handle.shape == gate.shape and handle.isnan().all()
    for got in (codes, codes_alone):
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("values", [False, True])
def test_gradients_against_float64(backend, values):
    leaves = torch.randn(2, 6, 40, generator=generator(1))
    upstream = torch.randn(6, 40, generator=generator(2))

    def gradients(dtype, function):
        gate, up = (t.to(dtype).requires_grad_() for t in leaves)
        return torch.autograd.grad(function(gate, up), (gate, up), upstream.to(dtype))

    def plain(gate, up):
        return torch.nn.functional.silu(gate) * up

    def ours(gate, up):
        return qk.silu_mul_quantize_train(gate, up, 8, values=values)[0]

    exact, baseline = gradients(torch.float64, plain), gradients(torch.float32, plain)
    for got, base, want in zip(gradients(torch.float32, ours), baseline, exact, strict=True):
        assert_within_ratio(got, base, want, 3.0)


@pytest.mark.parametrize("ste_clip", [None, 0.2])
def test_product_in_one_operator_equals_the_two(backend, ste_clip):
    """Outputs and gradients, bit for bit; what differs is that no codes are kept."""
    weight, bias = torch.randn(12, 40, generator=generator(3)), torch.randn(12)
    codes, scale = qk.quantize(weight, 4)
    options = {"w_codes": codes, "w_scale": scale, "ste_clip": ste_clip}
    upstream = torch.randn(6, 12, generator=generator(4))

    def two(gate, up, weight, bias):
        rows = qk.silu_mul_quantize_train(gate, up, 8, values=ste_clip is not None)
        return qk.qat_matmul(*rows, weight, bias, **options)

    def one(gate, up, weight, bias):
        return qk.silu_mul_qat_matmul(gate, up, weight, bias, a_bits=8, **options)

    results = []
    for function in (one, two):
        leaves = [*torch.randn(2, 6, 40, generator=generator(1)), weight, bias]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_native_equals_spec_over_the_range_of_exp(isa):
    gate = torch.cat(
        (torch.linspace(-95, 95, 200_000), torch.tensor([INF, -INF, NAN, 0.0, -0.0, -88.0, 87.0]))
    )
    up = torch.ones_like(gate)
    assert_same_bits(native.silu_mul(gate, up), spec.silu_mul(gate, up))


def test_layouts(isa):
    x = torch.randn(5, 24, generator=generator(6))
    for name, view in layouts(x):
        for a, b in zip(
            native.silu_mul_quantize(view, view, 8), spec.silu_mul_quantize(x, x, 8), strict=True
        ):
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(isa, shape):
    codes, scale = native.silu_mul_quantize(torch.zeros(shape), torch.zeros(shape), 8)
    assert codes.shape == shape and scale.shape == shape[:-1] and (scale == 1).all()


def test_bad_arguments_name_the_argument(isa):
    x = torch.zeros(2, 8)
    for message, call in {
        "up: ": lambda: native.silu_mul(x, torch.zeros(2, 7)),
        "up: expected float32": lambda: native.silu_mul(x, x.to(torch.float16)),
        "bits": lambda: native.silu_mul_quantize(x, x, 1),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
