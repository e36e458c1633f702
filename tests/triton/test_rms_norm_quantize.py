"""RMSNorm on Triton: forward bit for bit, backward by the 3x rule, guard bands around all."""

import pytest
import torch

from llmqat_kernels.backends.triton import rms_norm_quantize as kernels
from llmqat_kernels.spec import norm as spec
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

LENGTHS = (1, 2, 3, 64, 127, 257, 576, 1025)
CASES = [(torch.float32, columns) for columns in LENGTHS] + [
    (dtype, columns) for dtype in (torch.float16, torch.bfloat16) for columns in (3, 64, 257)
]
"""The interpreter's cost is that of the code, not of the dtype: 16 bits run a few lengths."""
EPS = 1e-5


def weight(columns, dtype=torch.float32):
    return (torch.randn(columns, generator=generator(columns + 1)) + 1).to(dtype)


def check(x, w, bits=8, residual=None):
    add = None if residual is None else poisoned(residual)
    with guard_bands():
        got = run("rms_norm_quantize", poisoned(x), poisoned(w), EPS, bits, add)
    want = spec.rms_norm_quantize(x, w, EPS, bits, residual)
    for a, b, name in zip(got, want, ("codes", "scales", "sum"), strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize(("dtype", "columns"), CASES)
def test_special_rows(dtype, columns):
    x, residual = special_rows(columns, dtype), special_rows(columns, dtype).flip(0)
    check(x, weight(columns, dtype), 8, residual)
    check(x, weight(columns), 4)
    with guard_bands():
        y = run("rms_norm", poisoned(x), poisoned(weight(columns, dtype)), EPS)
    assert_same_bits(y, spec.rms_norm(x, weight(columns, dtype), EPS))


@pytest.mark.parametrize("columns", [4096, 11008, 28672])
def test_rows_of_real_models(columns):
    x = torch.randn(2, columns, generator=generator(columns)).to(torch.bfloat16)
    check(x, weight(columns, torch.bfloat16), 8, x.flip(0))


@pytest.mark.parametrize("columns", [600, 1100, 3000, 4096])
def test_sum_in_the_specified_order(columns):
    """Terms of very different size: another order of the sum gives other bits."""
    exponents = torch.randint(-12, 12, (2, columns), generator=generator(columns))
    x = torch.randn(2, columns, generator=generator(1)) * torch.exp2(exponents.float() / 2)
    check(x, weight(columns))


def test_layouts_and_alignment():
    x = torch.randn(5, 24, generator=generator(6))
    want = spec.rms_norm_quantize(x, weight(24), EPS, 8, x)
    for name, view in (*layouts(x), ("one element off", poisoned(x, offset=1))):
        got = run("rms_norm_quantize", view, weight(24), EPS, 8, view)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b, name)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(shape):
    x, w = torch.zeros(shape), torch.ones(shape[-1])
    codes, scale, nothing = run("rms_norm_quantize", x, w, EPS, 8, None)
    assert codes.shape == shape and scale.shape == shape[:-1] and bool((scale == 1).all())
    assert nothing.shape == (0,)
    assert run("rms_norm_quantize", x, w, EPS, 8, x)[2].shape == shape
    assert run("rms_norm", x, w, EPS).shape == shape
    dx, dweight = run("rms_norm_backward", x, x, w, EPS, None)
    assert dx.shape == shape and bool((dweight == 0).all()) and dweight.shape == w.shape


def gradients(x, w, grad, total):
    """(dx, dweight) in fp64 by autograd."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    dx, dweight = torch.autograd.grad(y, (x, w), grad.double())
    return dx if total is None else dx + total.double(), dweight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 128, 576])
@pytest.mark.parametrize("has_total", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_backward(monkeypatch, dtype, columns, has_total, long):
    if long:
        monkeypatch.setattr(kernels, "MAX_HELD_BYTES", 0)
        monkeypatch.setattr(kernels, "LONG_WIDTH", 256)
    x, grad, total = torch.randn(3, 2, 5, columns, generator=generator(8)).to(dtype)
    w = weight(columns, dtype)
    total = total if has_total else None
    with guard_bands():
        dx, dweight = run(
            "rms_norm_backward",
            poisoned(grad),
            poisoned(x),
            poisoned(w),
            EPS,
            poisoned(total) if has_total else None,
        )
    plain_dx, plain_dweight = spec.rms_norm_backward(grad, x, w, EPS, total)
    exact_dx, exact_dweight = gradients(x, w, grad, total)
    assert dx.dtype == dtype and dweight.dtype == dtype
    assert_within_ratio(dx, plain_dx, exact_dx, 3)
    assert_within_ratio(dweight, plain_dweight, exact_dweight, 3)


def test_backward_repeats_bit_for_bit_and_takes_any_layout():
    x, w = torch.randn(9, 34, generator=generator(5)), weight(34)
    want = run("rms_norm_backward", x, x, w, EPS, x)
    for name, view in layouts(x):
        got = run("rms_norm_backward", view, view, w, EPS, view)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b, name)


def test_backward_sums_many_programs(monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: 20)
    x, grad = torch.randn(2, 45, 40, generator=generator(5))
    with guard_bands():
        _, dweight = run("rms_norm_backward", poisoned(grad), poisoned(x), weight(40), EPS, None)
    exact = gradients(x, weight(40), grad, None)[1]
    plain = spec.rms_norm_backward(grad, x, weight(40), EPS)[1]
    assert_within_ratio(dweight, plain, exact, 3)


def test_backward_heuristics():
    assert kernels.backward_programs(3, 132) == 3
    assert kernels.backward_programs(10_000, 132) == 264
    assert kernels.backward_tile(4096, 2) == (False, 4096, 8)
    assert kernels.backward_tile(8192, 4) == (True, kernels.LONG_WIDTH, 8)
    assert kernels.backward_tile(5, 2) == (False, 256, 1)
