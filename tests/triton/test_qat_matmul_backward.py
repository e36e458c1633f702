"""Gradients of the integer linears: the ratio rule against plain torch of the same dtype."""

from unittest import mock

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.backends.triton import qat_matmul_backward, tiles
from llmqat_kernels.backends.triton.matmul_tiles import BACKWARD, BACKWARD_FP32
from llmqat_kernels.spec import linear as spec
from llmqat_kernels.spec.quantize import dequantize
from llmqat_kernels.testing import DTYPES, assert_within_ratio, generator

from .device import run
from .guard import guard_bands, poisoned

SIZES = [(1, 1, 1), (5, 33, 17), (70, 65, 130), (64, 64, 128)]


def exact_input(grad, w, scale, group_size):
    return grad.double() @ dequantize(w, scale, group_size, torch.float32).double()


def exact_weight(grad, a, a_scale):
    return grad.double().T @ dequantize(a, a_scale, -1, torch.float32).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_input(m, n, k, dtype):
    grad = torch.randn(m, n, generator=generator(1)).to(dtype)
    w, scale = qk.quantize(torch.randn(n, k, generator=generator(2)), 4)
    with guard_bands():
        got = run("qat_matmul_backward_input", poisoned(grad), poisoned(w), poisoned(scale), -1)
    assert got.dtype == dtype
    plain = spec.qat_matmul_backward_input(grad, w, scale, -1)
    assert_within_ratio(got, plain, exact_input(grad, w, scale, -1), ratio=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 10, 64, 160])
def test_input_of_groups(group_size, dtype):
    grad = torch.randn(9, 33, generator=generator(1)).to(dtype)
    w, scale = qk.quantize(torch.randn(33, 320, generator=generator(2)), 4, group_size=group_size)
    with guard_bands():
        got = run(
            "qat_matmul_backward_input", poisoned(grad), poisoned(w), poisoned(scale), group_size
        )
    plain = spec.qat_matmul_backward_input(grad, w, scale, group_size)
    assert_within_ratio(got, plain, exact_input(grad, w, scale, group_size), ratio=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_weight(m, n, k, dtype):
    grad = torch.randn(m, n, generator=generator(1)).to(dtype)
    a, a_scale = qk.quantize(torch.randn(m, k, generator=generator(2)), 8)
    for output in (dtype, torch.float32):
        with guard_bands():
            got = run(
                "qat_matmul_backward_weight", poisoned(grad), poisoned(a), poisoned(a_scale), output
            )
        assert got.dtype == output
        plain = spec.qat_matmul_backward_weight(grad, a, a_scale, output)
        assert_within_ratio(got, plain, exact_weight(grad, a, a_scale), ratio=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_is_right(dtype):
    grad = torch.randn(70, 96, generator=generator(1)).to(dtype)
    w, scale = qk.quantize(torch.randn(96, 130, generator=generator(2)), 4)
    a, a_scale = qk.quantize(torch.randn(70, 130, generator=generator(3)), 8)
    for tile in BACKWARD_FP32 + BACKWARD[80] + BACKWARD[90]:
        for op in qat_matmul_backward.KERNELS:
            with tiles.forced(op, tile):
                if op.endswith("input"):
                    got = run(op, grad, w, scale, -1)
                    plain, exact = grad @ dequantize(w, scale, -1, dtype), None
                    exact = exact_input(grad, w, scale, -1)
                else:
                    got = run(op, grad, a, a_scale, dtype)
                    plain = spec.qat_matmul_backward_weight(grad, a, a_scale, dtype)
                    exact = exact_weight(grad, a, a_scale)
            assert_within_ratio(got, plain, exact, ratio=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_composed_of_dequantize_and_a_product(dtype):
    """What `use_composed` asks for instead of the kernels, to the same rule."""
    grad = torch.randn(70, 96, generator=generator(1)).to(dtype)
    w, scale = qk.quantize(torch.randn(96, 130, generator=generator(2)), 4)
    a, a_scale = qk.quantize(torch.randn(70, 130, generator=generator(3)), 8)
    own = mock.patch.object(qat_matmul_backward, "launch")
    with qk.use_composed(*qat_matmul_backward.KERNELS), own as launched:
        dx = run("qat_matmul_backward_input", grad, w, scale, -1)
        dw = run("qat_matmul_backward_weight", grad, a, a_scale, dtype)
    launched.assert_not_called()
    plain = spec.qat_matmul_backward_input(grad, w, scale, -1)
    assert_within_ratio(dx, plain, exact_input(grad, w, scale, -1), ratio=3)
    plain = spec.qat_matmul_backward_weight(grad, a, a_scale, dtype)
    assert_within_ratio(dw, plain, exact_weight(grad, a, a_scale), ratio=3)


def test_integers_are_exact():
    """Small integers have exact products and sums in every dtype, so nothing may be lost."""
    grad = torch.randint(-3, 4, (20, 40), generator=generator(1)).to(torch.bfloat16)
    codes = torch.randint(-7, 8, (40, 70), generator=generator(2)).to(torch.int8)
    got = run("qat_matmul_backward_input", grad.float(), codes, torch.ones(40), -1)
    assert torch.equal(got, grad.float() @ codes.float())
    a = torch.randint(-127, 128, (20, 70), generator=generator(3)).to(torch.int8)
    got = run("qat_matmul_backward_weight", grad, a, torch.ones(20), torch.float32)
    assert torch.equal(got, grad.float().T @ a.float())


def test_strided_and_batched_gradients():
    grad = torch.randn(33, 6, generator=generator(1)).T.reshape(2, 3, 33)
    w, scale = qk.quantize(torch.randn(33, 20, generator=generator(2)), 8)
    a, a_scale = qk.quantize(torch.randn(2, 3, 20, generator=generator(3)), 8)
    got = run("qat_matmul_backward_input", grad, w, scale, -1)
    torch.testing.assert_close(got, spec.qat_matmul_backward_input(grad, w, scale, -1))
    expanded = torch.ones(1, 1, 33).expand(2, 3, 33)
    got = run("qat_matmul_backward_weight", expanded, a, a_scale, torch.float32)
    want = spec.qat_matmul_backward_weight(expanded, a, a_scale, torch.float32)
    torch.testing.assert_close(got, want)


def test_a_gradient_of_nan_poisons_its_row_only():
    grad = torch.randn(4, 17, generator=generator(1))
    w, scale = qk.quantize(torch.randn(17, 20, generator=generator(2)), 8)
    clean = run("qat_matmul_backward_input", grad, w, scale, -1)
    grad[2, 3] = float("nan")
    got = run("qat_matmul_backward_input", grad, w, scale, -1)
    assert got[2].isnan().all() and torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty_sums_are_zero(m, n, k):
    grad = torch.ones(m, n)
    w, a = torch.zeros(n, k, dtype=torch.int8), torch.zeros(m, k, dtype=torch.int8)
    got = run("qat_matmul_backward_input", grad, w, torch.ones(n), -1)
    assert torch.equal(got, torch.zeros(m, k))
    got = run("qat_matmul_backward_weight", grad, a, torch.ones(m), torch.bfloat16)
    assert torch.equal(got, torch.zeros(n, k, dtype=torch.bfloat16))
