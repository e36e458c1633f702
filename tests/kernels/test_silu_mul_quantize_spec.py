"""silu_mul, silu_mul_quantize and the training form: spec 14, and every backend against it."""

import pytest
import torch

from llmqat_kernels.spec import activation as spec
from llmqat_kernels.testing import (
    DTYPES,
    ROW_LENGTHS,
    assert_same_bits,
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
        for got, want in (
            (native.silu_mul_quantize(gate, up, bits), spec.silu_mul_quantize(gate, up, bits)),
            (
                native.silu_mul_quantize_train(gate, up, bits),
                spec.silu_mul_quantize_train(gate, up, bits),
            ),
        ):
            for a, b in zip(got, want, strict=True):
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
