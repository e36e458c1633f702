"""Integer linears on int8 and packed codes: the spec's bits whatever the tile, batch or layout."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.backends.triton import quantized_linear, tiles
from llmqat_kernels.backends.triton.matmul_tiles import CODES, GROUPS
from llmqat_kernels.spec import linear as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, assert_within_ratio, generator

from .device import run
from .guard import guard_bands, poisoned


def operands(m, n, k, bits=8, group_size=-1):
    a, a_scale = qk.quantize(torch.randn(m, k, generator=generator(m * 31 + k)), 8)
    w, w_scale = qk.quantize(torch.randn(n, k, generator=generator(n)), bits, group_size=group_size)
    return a, a_scale, w, w_scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 17, 33), (17, 65, 130), (66, 31, 128)])
def test_equals_spec_between_guard_bands(m, n, k, dtype):
    a, a_scale, w, w_scale = operands(m, n, k, 4)
    for bias_dtype in (dtype, torch.float32):
        bias = torch.randn(n, generator=generator(5)).to(bias_dtype)
        want = spec.quantized_matmul(a, a_scale, w, w_scale, bias, 4, -1, dtype)
        for weight in (w, qk.pack_int4(w)):
            guarded = map(poisoned, (a, a_scale, weight, w_scale, bias))
            with guard_bands():
                got = run("quantized_matmul", *guarded, 4, -1, dtype)
            assert_same_bits(got, want)


@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_tensors(offset):
    a, a_scale, w, w_scale = operands(5, 18, 48)
    shifted = [poisoned(x, offset) for x in (a, a_scale, w, w_scale)]
    want = spec.quantized_matmul(a, a_scale, w, w_scale, None, 8, -1, torch.float32)
    assert_same_bits(run("quantized_matmul", *shifted, None, 8, -1, torch.float32), want)
    strided = a.repeat_interleave(2, dim=1)[:, ::2]
    got = run("quantized_matmul", strided, a_scale, w, w_scale, None, 8, -1, torch.float32)
    assert_same_bits(got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_no_tile_changes_a_bit(packed):
    a, a_scale, w, w_scale = operands(33, 70, 150, 4)
    weight = qk.pack_int4(w) if packed else w
    want = spec.quantized_matmul(a, a_scale, w, w_scale, None, 4, -1, torch.float32)
    for tile in quantized_linear.CANDIDATES["quantized_matmul"]:
        with tiles.forced("quantized_matmul", tile):
            got = run("quantized_matmul", a, a_scale, weight, w_scale, None, 4, -1, torch.float32)
        assert_same_bits(got, want, str(tile))


@pytest.mark.parametrize("group_size", [1, 3, 10, 32, 96, 150, 160, 256])
def test_groups(group_size):
    k = group_size * max(2, 16 // group_size)
    a, a_scale, w, w_scale = operands(3, 18, k, 4, group_size)
    bias = torch.randn(18, generator=generator(6))
    want = spec.quantized_matmul(a, a_scale, w, w_scale, bias, 4, group_size, torch.float32)
    for weight in (w, qk.pack_int4(w)):
        guarded = map(poisoned, (a, a_scale, weight, w_scale, bias))
        with guard_bands():
            got = run("quantized_matmul", *guarded, 4, group_size, torch.float32)
        assert_same_bits(got, want)


def test_no_tile_changes_a_bit_of_groups():
    a, a_scale, w, w_scale = operands(20, 66, 128, 4, 64)
    want = spec.quantized_matmul(a, a_scale, w, w_scale, None, 4, 64, torch.bfloat16)
    for tile in GROUPS:
        with tiles.forced("grouped_matmul", tile):
            got = run("quantized_matmul", a, a_scale, w, w_scale, None, 4, 64, torch.bfloat16)
        assert_same_bits(got, want, str(tile))


def test_groups_keep_the_sign_of_zero():
    a, w = torch.zeros(1, 8, dtype=torch.int8), torch.ones(2, 8, dtype=torch.int8)
    scale = torch.tensor([[-1.0, -1.0], [1.0, -1.0]])
    got = run("quantized_matmul", a, torch.ones(1), w, scale, None, 8, 4, torch.float32)
    want = spec.quantized_matmul(a, torch.ones(1), w, scale, None, 8, 4, torch.float32)
    assert_same_bits(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [1041, 28672])
def test_worst_case_accumulators(k, packed):
    top = 7 if packed else 127
    a = torch.full((2, k), 127, dtype=torch.int8)
    a[1, 1::2] = -127
    w = torch.full((3, k), top, dtype=torch.int8)
    w[1] = -top
    w[2, ::2] = -top
    want = a.to(torch.int64) @ w.to(torch.int64).T
    got = run("int_matmul", a, qk.pack_int4(w) if packed else w, 4 if packed else 8)
    assert_same_bits(got.to(torch.int64), want)


def test_packed_code_of_minus_eight():
    packed = torch.full((2, 16), 0x88, dtype=torch.uint8)
    a = torch.full((1, 32), 127, dtype=torch.int8)
    assert_same_bits(run("int_matmul", a, packed, 4), spec.int_matmul(a, packed, 4))


def test_scales_of_nan_poison_their_row_only():
    a, a_scale, w, w_scale = operands(4, 9, 40)
    clean = spec.quantized_matmul(a, a_scale, w, w_scale, None, 8, -1, torch.float32)
    a_scale[1], w_scale[3] = float("nan"), float("nan")
    got = run("quantized_matmul", a, a_scale, w, w_scale, None, 8, -1, torch.float32)
    assert got[1].isnan().all() and got[:, 3].isnan().all()
    rows, columns = [0, 2, 3], [0, 1, 2, *range(4, 9)]
    assert_same_bits(got[rows][:, columns], clean[rows][:, columns])


def test_a_row_alone_and_in_any_batch():
    a, a_scale, w, w_scale = operands(130, 20, 70)
    whole = run("quantized_matmul", a, a_scale, w, w_scale, None, 8, -1, torch.bfloat16)
    for rows in (slice(0, 1), slice(5, 22), slice(64, 129)):
        part = run(
            "quantized_matmul", a[rows], a_scale[rows], w, w_scale, None, 8, -1, torch.bfloat16
        )
        assert_same_bits(part, whole[rows])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(shape):
    a = torch.zeros(shape, dtype=torch.int8)
    w, bias = torch.zeros(5, shape[-1], dtype=torch.int8), torch.arange(5.0)
    scales = torch.ones(shape[:-1]), torch.ones(5)
    got = run("quantized_matmul", a, scales[0], w, scales[1], bias, 8, -1, torch.float32)
    assert_same_bits(got, bias.expand(*shape[:-1], 5).contiguous())


def test_no_groups():
    a, w, bias = (
        torch.zeros(3, 0, dtype=torch.int8),
        torch.zeros(5, 0, dtype=torch.int8),
        torch.arange(5.0),
    )
    scales = torch.full((3,), float("nan")), torch.ones(5, 0)
    for b in (None, bias):
        got = run("quantized_matmul", a, scales[0], w, scales[1], b, 8, 4, torch.float32)
        want = spec.quantized_matmul(a, scales[0], w, scales[1], b, 8, 4, torch.float32)
        assert_same_bits(got, want)


def test_float_activations_follow_the_ratio_rule():
    x = torch.randn(5, 64, generator=generator(4)).to(torch.bfloat16)
    w, scale = qk.quantize(torch.randn(12, 64, generator=generator(5)), 4)
    dense = qk.dequantize(w, scale, dtype=torch.bfloat16)
    got = run("quantized_linear", x, qk.pack_int4(w), scale, None, 4, 16, -1)
    assert_within_ratio(got, x @ dense.T, x.double() @ dense.double().T)


def test_qat_linear_returns_its_codes():
    x = torch.randn(2, 3, 40, generator=generator(8))
    w, scale = qk.quantize(torch.randn(6, 40, generator=generator(9)), 4)
    with torch.no_grad():
        got = run("qat_linear", x, torch.zeros(6, 40), w, scale, None, 8, -1, None)
    for one, other in zip(
        got, spec.qat_linear(x, torch.zeros(6, 40), w, scale, None, 8), strict=True
    ):
        assert_same_bits(one, other)


def test_every_tile_is_compiled():
    for arch in tiles.ARCHS:
        listed = {v.name for v in quantized_linear.variants(arch)}
        for tile in CODES[arch]:
            assert f"int8_matmul int8 bf16 {tile.m}x{tile.n}x{tile.k}" in listed
