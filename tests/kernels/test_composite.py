"""Operators that backends compose of others."""

import pytest
import torch

from llmqat_kernels.backends import composite
from llmqat_kernels.spec import linear


def operands(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    x, w, bias = (torch.randn(*s, generator=generator) for s in ((2, 3, 96), (70, 96), (70,)))
    return tuple(t.to(device=device, dtype=dtype) for t in (x, w, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_matmul_is_the_specification_on_the_cpu(dtype):
    x, w, bias = operands(dtype)
    for b in (None, bias):
        assert torch.equal(composite.float_matmul(x, w, b, 70), linear.float_matmul(x, w, b, 70))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_matmul_sums_in_fp32_on_cuda(dtype):
    """Products of 16-bit numbers are exact in fp32: the results differ by one rounding at most."""
    x, w, bias = operands(dtype, "cuda")
    for b in (None, bias):
        got = composite.float_matmul(x, w, b, 70)
        assert got.dtype == dtype and got.shape == (2, 3, 70)
        exact = linear.float_matmul(x.double(), w.double(), None, 70).double()
        exact = exact if b is None else exact + b.double()
        bound = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-5
        assert ((got.double() - exact).abs() <= bound).all()
