"""repacked_linear: the bits of float_matmul on the dequantized weight (spec 5, 7, 17), whatever the
instruction set, batch, cut, thread count and stored form of the codes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmqat_kernels import native
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator
from tests.kernels.test_matmul_native import OPS, codes, pack, scales

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)
ROWS = (1, 2, 3, 4, 5, 8, 9, 31)
"""Every form of tile: rows that unpack in registers, one block of more rows, several blocks."""


def dequantized(w: Tensor, sw: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Spec 5, written out again."""
    wide = sw[:, None] if group == -1 else sw.repeat_interleave(group, dim=1)
    return (w.float() * wide).to(dtype)


def on_floats(x: Tensor, w: Tensor, sw: Tensor, bias: Tensor | None, group: int) -> Tensor:
    floats = dequantized(w, sw, group, x.dtype)
    return OPS.float_matmul(x, OPS.repack_weight(floats.float(), 32), bias, len(w))


def weight(n: int, k: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes, the least of the panels' range among them, and scales."""
    w = codes(n, k, bits, n * 1000 + k)
    if w.numel():
        w[-1, -1] = -8 if bits <= 4 else -128
    sw = scales(n, seed=n) if group == -1 else scales(n, k // group, seed=n)
    return w, sw


def check(m: int, n: int, k: int, bits: int, group: int, dtype: torch.dtype) -> None:
    w, sw = weight(n, k, bits, group)
    x = torch.randn(m, k, generator=generator(m)).to(dtype)
    bias = torch.randn(n, generator=generator(3)).to(dtype) if m % 2 else None
    want, what = on_floats(x, w, sw, bias, group), f"{m}x{n}x{k} {bits} bits, groups of {group}"
    layouts = [OPS.repack_weight(w, bits)]
    rows = [w]
    if bits == 4:
        layouts.append(OPS.repack_weight(pack(w), 4))
        rows.append(pack(w))
    for layout in layouts:
        got = OPS.repacked_linear(x, layout, sw, bias, n, bits, group)
        assert_same_bits(got, want, what)
    for stored in rows:
        got = OPS.quantized_linear(x, stored, sw, bias, bits, 16, group)
        assert_same_bits(got, want, f"{what}, row-major")


@pytest.mark.parametrize("bits", (2, 4, 5, 8))
@pytest.mark.parametrize("k", (1, 2, 3, 5, 64, 127, 130))
def test_odd_shapes(isa: str, k: int, bits: int) -> None:
    for n in (1, 16, 17, 33, 64, 150):
        for m in ROWS:
            check(m, n, k, bits, -1, torch.float32)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("group", (1, 2, 3, 4, 7, 14, 32, 128, 192))
def test_groups(isa: str, group: int, bits: int) -> None:
    for groups in (1, 3):
        for m in ROWS:
            check(m, 50, group * groups, bits, group, torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("bits", (4, 8))
def test_values_are_rounded_to_the_dtype_of_x(isa: str, bits: int, dtype: torch.dtype) -> None:
    for m, n, k, group in ((1, 40, 70, -1), (2, 33, 129, -1), (17, 50, 84, 14), (3, 16, 1030, -1)):
        check(m, n, k, bits, group, dtype)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("k,n,m", ((576, 300, 64), (2500, 40, 31), (1026, 16, 30), (4096, 70, 520)))
def test_instruction_sets_and_batches_agree(k: int, n: int, m: int, bits: int) -> None:
    w, sw = weight(n, k, bits, -1)
    x, layout, results = torch.randn(m, k, generator=generator(1)), OPS.repack_weight(w, bits), []
    for name in native.supported_isas():
        if name == "scalar" and m * n * k > 5e6:
            continue  # minutes
        with native.set_isa(name):
            results.append(OPS.repacked_linear(x, layout, sw, None, n, bits, -1))
            for rows in (slice(0, 1), slice(1, 4), slice(5, 16)):
                few = OPS.repacked_linear(x[rows], layout, sw, None, n, bits, -1)
                assert_same_bits(few, results[-1][rows])
    assert_same_bits(results[0], on_floats(x, w, sw, None, -1))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_threads_do_not_change_a_bit(isa: str) -> None:
    """Few panels and many rows: threads share rows; many panels: they share panels."""
    threads = torch.get_num_threads()
    try:
        for m, n, k in ((1, 900, 260), (5, 900, 130), (200, 70, 64)):
            w, sw = weight(n, k, 4, -1)
            x, layout = torch.randn(m, k, generator=generator(1)), OPS.repack_weight(w, 4)
            torch.set_num_threads(1)
            want = OPS.repacked_linear(x, layout, sw, None, n, 4, -1)
            for count in (2, 3):
                torch.set_num_threads(count)
                got = OPS.repacked_linear(x, layout, sw, None, n, 4, -1)
                assert_same_bits(got, want, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_in_their_row_and_channel(isa: str, dtype: torch.dtype) -> None:
    n, k = 40, 33
    w, sw = weight(n, k, 4, -1)
    sw[[3, 20, 35]] = torch.tensor([math.nan, math.inf, -math.nan])
    x = torch.randn(12, k, generator=generator(1)).to(dtype)
    x[1, 5], x[2, 7] = math.nan, math.inf
    for m in (1, 3, 12):
        got = OPS.repacked_linear(x[:m], OPS.repack_weight(w, 4), sw, None, n, 4, -1)
        assert_same_bits(got, on_floats(x[:m], w, sw, None, -1))
        assert got[0, [3, 35]].isnan().all() and got[0, [2, 4, 34, 36]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("m,n,k", ((0, 5, 8), (3, 0, 8), (2, 5, 0), (40, 5, 0), (0, 0, 0)))
def test_empty(isa: str, m: int, n: int, k: int, bits: int, dtype: torch.dtype) -> None:
    layout = OPS.repack_weight(torch.zeros(n, k, dtype=torch.int8), bits)
    bias = torch.randn(n, generator=generator(1)).to(dtype)
    for group, sw in ((-1, torch.ones(n)), (8, torch.ones(n, k // 8))):
        for b in (None, bias):
            y = OPS.repacked_linear(torch.ones(m, k, dtype=dtype), layout, sw, b, n, bits, group)
            want = torch.zeros(m, n, dtype=dtype) if k == 0 else torch.empty(m, n, dtype=dtype)
            assert_same_bits(y, want if b is None else want + b)


def test_leading_dimensions_and_strides(isa: str) -> None:
    w, sw = weight(20, 34, 4, -1)
    layout = OPS.repack_weight(w, 4)
    x = torch.randn(2, 34, 3, generator=generator(1)).transpose(1, 2)
    want = on_floats(x.reshape(6, 34), w, sw, None, -1).view(2, 3, 20)
    assert_same_bits(OPS.repacked_linear(x, layout, sw, None, 20, 4, -1), want)
    one = OPS.repacked_linear(x[0, 0], layout, sw, None, 20, 4, -1)
    assert_same_bits(one, want[0, 0])


def test_foreign_arguments_are_refused() -> None:
    packed = OPS.repack_weight(codes(32, 64, 4, 1), 4)
    x, sw = torch.ones(1, 64), torch.ones(32)
    floats = OPS.repack_weight(torch.ones(32, 64), 32)
    for args, match in (
        ((x, packed[:-1].contiguous(), sw, None, 32, 4, -1), "repack_weight"),
        ((x, packed, sw, None, 32, 8, -1), "bit width"),
        ((x, floats, sw, None, 32, 4, -1), "bit width"),
        ((x, packed, sw, None, 33, 4, -1), "n: the repacked"),
        ((x[:, :60], packed, sw, None, 32, 4, -1), "w: repacked for K"),
        ((x, packed, sw[:31], None, 32, 4, -1), "w_scale"),
        ((x, packed, sw, None, 32, 4, 32), "w_scale"),
        ((x, packed, sw, None, 32, 4, 7), "group_size"),
        ((x, packed, sw, torch.ones(31), 32, 4, -1), "bias"),
        ((x.int(), packed, sw, None, 32, 4, -1), "x"),
    ):
        with pytest.raises(RuntimeError, match=match):
            OPS.repacked_linear(*args)
