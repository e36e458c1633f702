"""torch's int4 GEMM on our codes: the same product."""

import pytest
import torch

import llmqat_kernels as qk
from benchmarks import tinygemm


@pytest.mark.parametrize("columns", [128, 64])
def test_it_computes_the_product_of_our_codes(columns):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(32, columns, generator=generator)
    codes, scale = qk.quantize(weight, 4, scale_dtype=torch.bfloat16)
    x = torch.randn(3, columns, generator=generator).bfloat16()
    y = tinygemm.linear(*tinygemm.pack(codes, scale), columns)(x)
    expected = x.double() @ (codes.double() * scale.double().unsqueeze(1)).T
    assert y.shape == (3, 32) and y.dtype == torch.bfloat16
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-2


def test_groups():
    assert tinygemm.group_of(4096) == 128 and tinygemm.group_of(96) == 32
    with pytest.raises(ValueError, match="divides K = 33"):
        tinygemm.group_of(33)
