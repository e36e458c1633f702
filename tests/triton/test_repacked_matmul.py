"""The layout of repack_weight by its description, its inverse, and products on it."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.backends.triton import repacked_matmul, tiles
from llmqat_kernels.backends.triton.matmul_tiles import GROUP_PAIRS
from llmqat_kernels.spec import linear as spec
from llmqat_kernels.spec.quantize import qmax
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator

from .device import run
from .guard import guard_bands, poisoned


def codes(n, k, bits, seed=0):
    top = qmax(bits)
    return torch.randint(-top, top + 1, (n, k), generator=generator(seed)).to(torch.int8)


def original(layout, n, k, bits):
    """The inverse of repack_weight, from the layout's description alone."""
    stored = layout.view(torch.int8).view(-1, -(-k // 16) * 16)
    assert not bool(stored[:, k:].any()), "padding must be code 0"
    stored = stored[:, :k]
    if bits > 4:
        return stored
    low = ((stored & 15) ^ 8) - 8
    both = torch.cat([(stored - low) // 16, low])
    assert not bool(both[n:].any()), "a missing channel must be code 0"
    return both[:n]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_inverse(bits):
    for n in (1, 2, 31, 32, 65):
        for k in (1, 15, 16, 17, 130):
            w = codes(n, k, bits, n * k)
            layout = run("repack_weight", w, bits)
            assert layout.dtype == torch.uint8 and layout.dim() == 1
            assert_same_bits(original(layout, n, k, bits), w)
            assert_same_bits(repacked_matmul.laid_out_codes(layout.cpu(), n, k, bits), w)
            if bits == 4:
                packed = run("repack_weight", qk.pack_int4(w), 4)
                assert_same_bits(packed, layout, "from packed codes")


def test_float_weights_keep_their_layout():
    w = torch.randn(5, 7, generator=generator(1)).to(torch.bfloat16)
    assert_same_bits(run("repack_weight", w.T, 16), w.T.contiguous())


def test_codes_beyond_four_bits_are_refused():
    for w in (torch.tensor([[1, 8]], dtype=torch.int8), torch.tensor([[0x80]], dtype=torch.uint8)):
        with pytest.raises(qk.InvalidArgument, match="does not fit"):
            run("repack_weight", w, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 17, 33), (17, 131, 130), (66, 30, 128)])
def test_equals_spec_between_guard_bands(m, n, k, dtype):
    a, a_scale = qk.quantize(torch.randn(m, k, generator=generator(m)), 8)
    bias = torch.randn(n, generator=generator(2)).to(dtype)
    for bits in (4, 8):
        w, w_scale = qk.quantize(torch.randn(n, k, generator=generator(n)), bits)
        want = spec.quantized_matmul(a, a_scale, w, w_scale, bias, bits, -1, dtype)
        layout = run("repack_weight", w, bits)
        guarded = [poisoned(x) for x in (a, a_scale, layout, w_scale, bias)]
        with guard_bands():
            got = run("repacked_matmul", *guarded, n, bits, -1, dtype)
        assert_same_bits(got, want, f"{bits} bits")


@pytest.mark.parametrize("group_size", [1, 10, 32, 96, 256])
def test_groups(group_size):
    k = group_size * max(2, 16 // group_size)
    a, a_scale = qk.quantize(torch.randn(3, k, generator=generator(1)), 8)
    bias = torch.randn(19, generator=generator(3))
    for bits in (3, 8):
        w, w_scale = qk.quantize(
            torch.randn(19, k, generator=generator(2)), bits, group_size=group_size
        )
        want = spec.quantized_matmul(a, a_scale, w, w_scale, bias, bits, group_size, torch.float32)
        layout = run("repack_weight", w, bits)
        guarded = [poisoned(x) for x in (a, a_scale, layout, w_scale, bias)]
        with guard_bands():
            got = run("repacked_matmul", *guarded, 19, bits, group_size, torch.float32)
        assert_same_bits(got, want, f"{bits} bits")


def test_no_tile_changes_a_bit():
    a, a_scale = qk.quantize(torch.randn(33, 160, generator=generator(1)), 8)
    for op, group_size, candidates in (
        ("repacked_matmul", -1, repacked_matmul.CANDIDATES["repacked_matmul"]),
        ("grouped_repacked_matmul", 32, GROUP_PAIRS),
    ):
        w, w_scale = qk.quantize(
            torch.randn(140, 160, generator=generator(2)), 4, group_size=group_size
        )
        layout = run("repack_weight", w, 4)
        want = spec.quantized_matmul(a, a_scale, w, w_scale, None, 4, group_size, torch.float32)
        for tile in candidates:
            with tiles.forced(op, tile):
                got = run(
                    "repacked_matmul", a, a_scale, layout, w_scale, None, 140, 4, group_size,
                    torch.float32,
                )  # fmt: skip
            assert_same_bits(got, want, str(tile))


def test_a_row_alone_and_in_any_batch():
    a, a_scale = qk.quantize(torch.randn(70, 48, generator=generator(1)), 8)
    w, w_scale = qk.quantize(torch.randn(33, 48, generator=generator(2)), 4)
    layout = run("repack_weight", w, 4)

    def product(rows):
        return run(
            "repacked_matmul", a[rows], a_scale[rows], layout, w_scale, None, 33, 4, -1,
            torch.float16,
        )  # fmt: skip

    whole = product(slice(0, 70))
    for rows in (slice(0, 1), slice(69, 70), slice(9, 40)):
        assert_same_bits(product(rows), whole[rows])


@pytest.mark.parametrize("k", [1041, 28672])
def test_worst_case_accumulators(k):
    """Both nibbles of a byte at their extremes, with every combination of signs."""
    a = torch.full((2, k), 127, dtype=torch.int8)
    a[1, 1::2] = -127
    w = torch.tensor([7, 7, -7, -7, 7, -7, 7, -7], dtype=torch.int8)[:, None].repeat(1, k)
    ones = torch.ones(2), torch.ones(8)
    got = run(
        "repacked_matmul", a, ones[0], run("repack_weight", w, 4), ones[1], None, 8, 4, -1,
        torch.float32,
    )  # fmt: skip
    want = (a.to(torch.int64) @ w.to(torch.int64).T).to(torch.float32)
    assert_same_bits(got, want)


def test_the_longest_sum_fits_int32():
    assert (16 * 7 + 7) * 127 * 131_071 < 2**31


def test_foreign_weights_are_refused():
    a, a_scale, w_scale = codes(1, 64, 8), torch.ones(1), torch.ones(32)
    layout = run("repack_weight", codes(32, 64, 4), 4)
    for weight in (layout[:-1], layout[:0], layout.view(16, 64), layout.view(torch.int8)):
        with pytest.raises(qk.InvalidArgument, match="repack_weight"):
            run("repacked_matmul", a, a_scale, weight, w_scale, None, 32, 4, -1, torch.float32)


def test_empty_batch():
    layout = run("repack_weight", codes(6, 32, 4), 4)
    a = torch.zeros(2, 0, 32, dtype=torch.int8)
    got = run(
        "repacked_matmul", a, torch.ones(2, 0), layout, torch.ones(6), None, 6, 4, -1, torch.float32
    )
    assert got.shape == (2, 0, 6)
