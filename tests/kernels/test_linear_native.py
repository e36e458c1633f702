"""quantized_linear and qat_linear: quantize rows, then the product; A16 is the float product."""

from __future__ import annotations

import pytest
import torch

from llmqat_kernels import native
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator
from tests.kernels.test_matmul_native import OPS, codes, expected_output, pack, scales

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_bits", (4, 6, 8))
def test_quantized_linear_is_quantize_then_matmul(
    isa: str, dtype: torch.dtype, a_bits: int
) -> None:
    x = torch.randn(2, 5, 70, generator=generator(1)).to(dtype)
    w, sw, bias = (
        codes(33, 70, 4, 2),
        scales(33, seed=3),
        torch.randn(33, generator=generator(4)).to(dtype),
    )
    a, sx = OPS.quantize(x, a_bits)
    expected = expected_output(a.view(10, 70), sx.view(10), w, sw, bias, -1, dtype).view(2, 5, 33)
    for weight in (w, pack(w)):
        assert_same_bits(OPS.quantized_linear(x, weight, sw, bias, 4, a_bits), expected)
    y, got_codes, got_scale = OPS.qat_linear(x, torch.zeros(33, 70), w, sw, bias, a_bits)
    assert_same_bits(y, expected)
    assert_same_bits(got_codes, a)
    assert_same_bits(got_scale, sx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", (-1, 14))
def test_float_activations(isa: str, dtype: torch.dtype, group: int) -> None:
    """A16: the fp32 product (spec 17) on the weight dequantized to x's dtype."""
    m, n, k = 17, 37, 70
    x = torch.randn(m, k, generator=generator(1)).to(dtype)
    w, sw = codes(n, k, 4, 2), scales(n, seed=3) if group == -1 else scales(n, k // group, seed=3)
    wide = sw[:, None].expand(n, k) if group == -1 else sw.repeat_interleave(group, dim=1)
    floats = (w.float() * wide).to(dtype)
    bias = torch.randn(n, generator=generator(4))
    expected = OPS.float_matmul(x, OPS.repack_weight(floats.float(), 32), bias, n)
    for weight in (w, pack(w)):
        assert_same_bits(OPS.quantized_linear(x, weight, sw, bias, 4, 16, group), expected)
    exact = x.double() @ floats.double().T + bias.double()
    baseline = torch.nn.functional.linear(x, floats, bias.to(dtype))
    error, allowed = (
        (expected.double() - exact).abs().max(),
        (baseline.double() - exact).abs().max(),
    )
    assert error <= 2 * allowed + 1e-6
