"""float_matmul: one fixed sum an output, whatever the batch, instruction set and storage."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from llmqat_kernels import native
from llmqat_kernels.testing import assert_same_bits, assert_within_ratio, generator
from tests.kernels.test_matmul_native import ODD_MN, OPS

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)


def fma_chain(x: Tensor, w: Tensor) -> Tensor:
    """fp32 FMA chain over k, in fp64.

    The product of two 8-bit significands takes 16 bits, so its fp64 sum with an fp32 value is exact
    (or rounded far below a tie), and the cast is the one rounding of an FMA.
    """
    y = torch.zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        y = (y.double() + x[:, k, None].double() * w[:, k].double()).float()
    return y


def blocked_sum(x: Tensor, w: Tensor) -> Tensor:
    """Spec 17: chains over blocks of 128 k, added in order."""
    blocks = [fma_chain(a, b) for a, b in zip(x.split(128, 1), w.split(128, 1), strict=True)]
    return functools.reduce(torch.add, blocks)


def short_floats(*shape: int, seed: int) -> Tensor:
    """Random values with 8 significant bits (see fma_chain)."""
    return torch.randn(*shape, generator=generator(seed)).to(torch.bfloat16).float().clamp(-4, 4)


@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16))
def test_float_matmul_is_the_blocked_sum(isa: str, stored: torch.dtype) -> None:
    for k in (0, 1, 3, 17, 64, 130, 259):
        for n in (1, 15, 16, 17, 65, 130):
            w = short_floats(n, k, seed=n)
            packed = OPS.repack_weight(w.to(stored), 16 if stored == torch.bfloat16 else 32)
            for m in ODD_MN:
                x, bias = (
                    short_floats(m, k, seed=m),
                    torch.randn(n, generator=generator(m)) if m % 2 else None,
                )
                expected = blocked_sum(x, w)
                expected = expected if bias is None else expected + bias
                assert_same_bits(OPS.float_matmul(x, packed, bias, n), expected, f"{m}x{n}x{k}")


@pytest.mark.parametrize("k,n,m", ((576, 300, 64), (2500, 40, 31), (1025, 16, 30), (11008, 48, 17)))
def test_float_matmul_isas_and_batches_agree(k: int, n: int, m: int) -> None:
    x, w = torch.randn(m, k, generator=generator(1)), torch.randn(n, k, generator=generator(2))
    exact = x.double() @ w.double().T
    for storage in (32, 16):
        weight = w if storage == 32 else w.bfloat16()
        packed, results = OPS.repack_weight(weight, storage), []
        for name in native.supported_isas():
            with native.set_isa(name):
                results.append(OPS.float_matmul(x, packed, None, n))
                for rows in (slice(0, 1), slice(1, 4), slice(5, 16)):
                    assert_same_bits(OPS.float_matmul(x[rows], packed, None, n), results[-1][rows])
        for other in results[1:]:
            assert_same_bits(other, results[0])
        if storage == 32:
            assert_within_ratio(results[0], x @ w.T, exact, slack=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_float_matmul_casts_once(isa: str, dtype: torch.dtype) -> None:
    x, w = (
        torch.randn(3, 50, generator=generator(1)).to(dtype),
        torch.randn(20, 50, generator=generator(2)).to(dtype),
    )
    packed = OPS.repack_weight(w, 16)
    assert_same_bits(
        OPS.float_matmul(x, packed, None, 20),
        OPS.float_matmul(x.float(), packed, None, 20).to(dtype),
    )


def test_non_finite_values_travel(isa: str) -> None:
    x = torch.tensor([[1.0, math.inf], [math.nan, 1.0], [1.0, 2.0]])
    packed = OPS.repack_weight(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 32)
    expected = torch.tensor([[math.inf, math.nan], [math.nan, math.nan], [3.0, 1.0]])
    assert_same_bits(OPS.float_matmul(x, packed, None, 2), expected)
