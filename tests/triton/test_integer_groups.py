"""Integer groups: the spec's bits between guard bands, whatever the tile and group."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.backends.triton import tiles
from llmqat_kernels.backends.triton.integer_groups import group_chunk
from llmqat_kernels.backends.triton.matmul_tiles import GROUPS
from llmqat_kernels.spec import linear, quantize
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator, special_rows

from .device import run
from .guard import guard_bands, poisoned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group_size"), [(5, 1), (96, 32), (130, 65), (5120, 4)])
def test_quantize(columns, group_size, dtype):
    x = special_rows(columns, dtype)
    want = quantize.quantize_integer_groups(x, 4, group_size)
    with guard_bands():
        got = run("quantize_integer_groups", poisoned(x), 4, group_size)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("group_size", [2, 3, 32, 96, 100, 256])
def test_product(group_size):
    k = group_size * max(2, 16 // group_size)
    a, a_scale = qk.quantize(torch.randn(5, k, generator=generator(1)), 8)
    x = torch.randn(19, k, generator=generator(2))
    w, multiplier, scale = quantize.quantize_integer_groups(x, 4, group_size)
    bias = torch.randn(19, generator=generator(3))
    want = linear.integer_group_matmul(
        a, a_scale, w, multiplier, scale, bias, group_size, torch.float32
    )
    for codes in (w, qk.pack_int4(w)):
        guarded = map(poisoned, (a, a_scale, codes, multiplier, scale, bias))
        with guard_bands():
            got = run("integer_group_matmul", *guarded, group_size, torch.float32)
        assert_same_bits(got, want)


def test_no_tile_changes_a_bit_and_rows_stand_alone():
    a, a_scale = qk.quantize(torch.randn(20, 128, generator=generator(1)), 8)
    x = torch.randn(66, 128, generator=generator(2))
    w = quantize.quantize_integer_groups(x, 4, 32)
    want = linear.integer_group_matmul(a, a_scale, *w, None, 32, torch.float16)
    for tile in GROUPS:
        with tiles.forced("integer_group_matmul", tile):
            got = run("integer_group_matmul", a, a_scale, *w, None, 32, torch.float16)
        assert_same_bits(got, want, str(tile))
    alone = run("integer_group_matmul", a[7:8], a_scale[7:8], *w, None, 32, torch.float16)
    assert_same_bits(alone, want[7:8])


def test_empty():
    assert run("quantize_integer_groups", torch.empty(0, 8), 4, 4)[1].shape == (0, 2)
    w = quantize.quantize_integer_groups(torch.ones(3, 8), 4, 4)
    a = torch.zeros(0, 8, dtype=torch.int8)
    got = run("integer_group_matmul", a, torch.ones(0), *w, None, 4, torch.float32)
    assert got.shape == (0, 3)


def test_group_too_long():
    with pytest.raises(qk.InvalidArgument, match="group_size"):
        run("quantize_integer_groups", torch.empty(1, 65_537), 4, 65_537)


@pytest.mark.parametrize(("group_size", "want"), [(1, (256, 16, 4)), (100, (32, 128, 4))])
def test_chunks(group_size, want):
    assert group_chunk(group_size) == want
