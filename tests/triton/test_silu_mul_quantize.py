"""SiLU * up on Triton: forward bit for bit, backward by the 3x rule, guard bands around all."""

import pytest
import torch

from llmqat_kernels.backends.triton import silu_mul_quantize as kernels
from llmqat_kernels.errors import InvalidArgument
from llmqat_kernels.spec import activation as spec
from llmqat_kernels.testing import (
    DTYPES,
    assert_same_bits,
    assert_within_ratio,
    generator,
    layouts,
    special_rows,
)

from .device import run
from .guard import guard_bands, poisoned

LENGTHS = (1, 2, 3, 17, 64, 257, 576)
CASES = [(torch.float32, columns) for columns in LENGTHS] + [
    (dtype, columns) for dtype in (torch.float16, torch.bfloat16) for columns in (3, 64, 257)
]
"""The interpreter's cost is that of the code, not of the dtype: 16 bits run a few lengths."""
INF, NAN = float("inf"), float("nan")


def check(gate, up, bits=8):
    with guard_bands():
        got = run("silu_mul_quantize", poisoned(gate), poisoned(up), bits)
    want = spec.silu_mul_quantize(gate, up, bits)
    for a, b, name in zip(got, want, ("codes", "scales"), strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize(("dtype", "columns"), CASES)
def test_special_rows(dtype, columns):
    gate, up = special_rows(columns, dtype), special_rows(columns, dtype).flip(0)
    check(gate, up)
    check(up, gate, 4)
    with guard_bands():
        y = run("silu_mul", poisoned(gate), poisoned(up))
    assert_same_bits(y, spec.silu_mul(gate, up))


@pytest.mark.parametrize("columns", [4096, 11008, 28672])
def test_rows_of_real_models(columns):
    gate, up = torch.randn(2, 2, columns, generator=generator(columns)).mul_(3).to(torch.bfloat16)
    check(gate, up)


def test_longest_fp32_rows_are_two_kernels():
    gate, up = torch.randn(2, 1, 28672, generator=generator(1))
    check(gate, up)


def test_over_the_range_of_exp():
    gate = torch.cat(
        (torch.linspace(-95, 95, 50_000), torch.tensor([INF, -INF, NAN, 0.0, -0.0, -88.0, 87.0]))
    )
    up = torch.ones_like(gate)
    assert_same_bits(run("silu_mul", gate, up), spec.silu_mul(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_tensor_are_not_copied(dtype):
    both = poisoned(torch.randn(6, 130, generator=generator(4)).to(dtype))
    gate, up = both.chunk(2, dim=-1)
    for half in (gate, up):
        rows, stride = kernels.strided_rows(half)
        assert rows.data_ptr() == half.data_ptr() and stride == 130
    rows, stride = kernels.strided_rows(gate.unflatten(0, (2, 3)))
    assert rows.data_ptr() == gate.data_ptr() and stride == 130
    plain = gate.cpu().contiguous(), up.cpu().contiguous()
    with guard_bands():
        codes = run("silu_mul_quantize", gate, up, 8)
        y = run("silu_mul", gate, up)
        gradients = run("silu_mul_backward", gate, gate, up)
    for a, b in zip(codes, spec.silu_mul_quantize(*plain, 8), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(y, spec.silu_mul(*plain))
    for a, b in zip(gradients, run("silu_mul_backward", plain[0], *plain), strict=True):
        assert_same_bits(a, b)


def test_layouts_and_alignment():
    x = torch.randn(5, 24, generator=generator(6))
    for name, view in (*layouts(x), ("one element off", poisoned(x, offset=1))):
        for a, b in zip(
            run("silu_mul_quantize", view, x, 8), spec.silu_mul_quantize(x, x, 8), strict=True
        ):
            assert_same_bits(a, b, name)
        assert_same_bits(run("silu_mul", x, view), spec.silu_mul(x, x), name)


def test_more_rows_than_the_grid_has(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_GRID_ROWS", 4)
    gate, up = torch.randn(5, 48, generator=generator(6)).chunk(2, dim=-1)
    assert_same_bits(run("silu_mul", gate, up), spec.silu_mul(gate, up))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(shape):
    x = torch.zeros(shape)
    codes, scale = run("silu_mul_quantize", x, x, 8)
    assert codes.shape == shape and scale.shape == shape[:-1] and bool((scale == 1).all())
    assert run("silu_mul", x, x).shape == shape
    assert [t.shape for t in run("silu_mul_backward", x, x, x)] == [shape, shape]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 576])
def test_backward(dtype, columns):
    grad, gate, up = torch.randn(3, 4, columns, generator=generator(8)).mul_(3).to(dtype)
    with guard_bands():
        got = run("silu_mul_backward", poisoned(grad), poisoned(gate), poisoned(up))
    wide_gate, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    y = torch.nn.functional.silu(wide_gate) * wide_up
    exact = torch.autograd.grad(y, (wide_gate, wide_up), grad.double())
    plain = spec.silu_mul_backward(grad, gate, up)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == dtype
        assert_within_ratio(a, b, c, 3)


def test_a_row_too_long_names_the_fix():
    x = torch.zeros(1, 32_769)
    with pytest.raises(InvalidArgument, match=r"gate: rows of 32769 elements .*; use "):
        run("silu_mul_quantize", x, x, 8)
