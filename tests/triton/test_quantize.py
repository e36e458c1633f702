"""Row quantization on Triton against the specification, with guard bands around every tensor."""

import pytest
import torch

from llmqat_kernels.errors import InvalidArgument
from llmqat_kernels.spec import quantize as spec
from llmqat_kernels.testing import (
    DTYPES,
    assert_same_bits,
    generator,
    layouts,
    special_rows,
    tie_row,
)

from .device import run
from .guard import guard_bands, poisoned

LENGTHS = (1, 2, 3, 17, 64, 127, 256, 257, 576, 1025)
CASES = [(torch.float32, columns) for columns in LENGTHS] + [
    (dtype, columns) for dtype in (torch.float16, torch.bfloat16) for columns in (3, 64, 257)
]
"""The interpreter's cost is that of the code, not of the dtype: 16 bits run a few lengths."""


def quantized(x, *args):
    with guard_bands():
        return run("quantize", poisoned(x), *args)


def check(x, *args):
    """codes, scales and their product of a tensor, all between guard bands."""
    codes, scale = quantized(x, *args)
    want_codes, want_scale = spec.quantize(x, *args)
    assert_same_bits(codes, want_codes, "codes")
    assert_same_bits(scale, want_scale, "scales")
    bits, group_size, bf16_scale = args
    with guard_bands():
        y = run("fake_quantize", poisoned(x), bits, group_size, None, bf16_scale)
    assert_same_bits(y, spec.fake_quantize(x, bits, group_size, None, bf16_scale), "fake_quantize")
    with guard_bands():
        y = run("dequantize", poisoned(codes), poisoned(scale), group_size, x.dtype)
    assert_same_bits(y, spec.dequantize(codes, scale, group_size, x.dtype), "dequantize")


@pytest.mark.parametrize(("dtype", "columns"), CASES)
def test_special_rows(dtype, columns):
    rows = special_rows(columns, dtype)
    check(rows, 8, -1, False)
    check(rows, 4, -1, True)


@pytest.mark.parametrize("columns", [11008, 28672])
def test_rows_of_real_models(columns):
    x = torch.randn(3, columns, generator=generator(columns)).to(torch.bfloat16)
    x[1, columns - 1] = float("nan")
    x[2, columns - 1] = 77.0
    check(x, 8, -1, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 3, 32, 64, 128])
def test_groups(dtype, group_size):
    x = torch.randn(5, 4 * group_size, generator=generator(group_size)).to(dtype)
    check(x, 4, group_size, False)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_ties_round_to_even(bits):
    row = tie_row(2048, bits)
    check(row * 2.0 ** torch.arange(-3, 4).unsqueeze(1), bits, -1, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_alignment(dtype):
    x = torch.randn(6, 34, generator=generator(5)).to(dtype)
    want = spec.quantize(x, 8)
    for name, view in (*layouts(x), ("one element off", poisoned(x, offset=1))):
        for got, expected in zip(run("quantize", view, 8), want, strict=True):
            assert_same_bits(got, expected, name)
        assert_same_bits(run("fake_quantize", view, 8), spec.fake_quantize(x, 8), name)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(shape):
    x = torch.empty(shape)
    codes, scale = run("quantize", x, 8)
    assert codes.shape == shape and scale.shape == shape[:-1] and bool((scale == 1).all())
    assert run("fake_quantize", x, 8).shape == shape
    assert run("dequantize", codes, scale, -1, torch.bfloat16).shape == shape
    assert run("fake_quantize_backward", x, x, 2.0).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ste_clip", [None, 1.0, 2.0])
def test_backward(dtype, ste_clip):
    x = torch.randn(7, 331, generator=generator(2)).mul_(2).to(dtype)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), 2.0, -1.0])
    grad = torch.randn(7, 331, generator=generator(3)).to(dtype)
    grad[1, 0] = float("nan")
    with guard_bands():
        dx = run("fake_quantize_backward", poisoned(grad), poisoned(x), ste_clip)
    assert_same_bits(dx, spec.fake_quantize_backward(grad, x, ste_clip))


def test_backward_takes_any_layout():
    x = torch.randn(6, 34, generator=generator(5)).mul_(2)
    for name, view in layouts(x):
        got = run("fake_quantize_backward", view, view, 2.0)
        assert_same_bits(got, spec.fake_quantize_backward(x, x, 2.0), name)


def test_backward_returns_a_copy():
    grad = torch.ones(2, 3)
    assert run("fake_quantize_backward", grad, grad, None).data_ptr() != grad.data_ptr()


def test_a_row_too_long_names_the_fix():
    with pytest.raises(InvalidArgument, match=r"x: rows of 32769 elements .*; use "):
        run("quantize", torch.zeros(1, 32_769), 8)
