"""The CPU kernels of integer group scales (spec 18): every instruction set and stored form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmqat_kernels import native
from llmqat_kernels.spec import int4, linear, quantize
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)

OPS = torch.ops.llmqat_cpu


def weight(n: int, k: int, group: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(n, k, generator=generator(n + k)) * torch.logspace(-2, 1, k)
    return quantize.quantize_integer_groups(values, bits, group)


def forms(codes: Tensor) -> Iterator[Tensor]:
    """Rows, packed rows, and repacked from either."""
    packed = int4.pack_int4(codes)
    yield from (codes, packed, OPS.repack_weight(codes, 4), OPS.repack_weight(packed, 4))


def activations(m: int, k: int, bits: int = 8) -> tuple[Tensor, Tensor]:
    return quantize.quantize(torch.randn(m, k, generator=generator(m)), bits)


# Groups inside a quad of 4 columns, across quads, of several; more channels than a panel of 32.
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(1, 1, 1), (3, 6, 2), (7, 30, 3), (33, 35, 5), (40, 60, 10), (64, 96, 32), (70, 256, 64)],
)
def test_every_form_and_row_count(isa: str, n: int, k: int, group: int) -> None:
    for bits in (2, 4):
        codes, multiplier, scale = weight(n, k, group, bits)
        bias = torch.randn(n, generator=generator(1)).to(torch.bfloat16)
        for m in (1, 2, 5, 8, 13, 30):
            a, a_scale = activations(m, k)
            for dtype in DTYPES:
                rest = multiplier, scale, bias, group, dtype
                want = linear.integer_group_matmul(a, a_scale, codes, *rest)
                for w in forms(codes):
                    got = OPS.integer_group_matmul(a, a_scale, w, *rest)
                    assert_same_bits(got, want, f"{m} rows, {w.dtype} {tuple(w.shape)}, {dtype}")


@pytest.mark.parametrize("k", [9, 64])
def test_packed_activations(isa: str, k: int) -> None:
    codes, *rest = weight(5, k, k)
    a, a_scale = activations(6, k, 4)
    want = linear.integer_group_matmul(a, a_scale, codes, *rest, None, k, torch.float32)
    for w in forms(codes):
        got = OPS.integer_group_matmul(
            int4.pack_int4(a).view(2, 3, -1), a_scale.view(2, 3), w, *rest, None, k, torch.float32
        )
        assert_same_bits(got, want.view(2, 3, 5))


@pytest.mark.parametrize("rows", [1, 9])
def test_the_longest_exact_sum(isa: str, rows: int) -> None:
    """63 * 7 * 127 * K, one sum above 2^31 - 2^15: any float on the way would round it."""
    k = 38_342
    a = torch.full((rows, k), 127, dtype=torch.int8)
    codes = torch.full((2, k), 7, dtype=torch.int8)
    codes[1] = -7
    multiplier = torch.full((2, 2), 63, dtype=torch.uint8)
    total = 63 * 7 * 127 * k
    assert 2**31 - 2**16 < total < 2**31
    want = torch.tensor([[total, -total]]).float().expand(rows, 2)
    for w in forms(codes):
        got = OPS.integer_group_matmul(
            a, torch.ones(rows), w, multiplier, torch.ones(2), None, k // 2, torch.float32
        )
        assert_same_bits(got, want)


def test_threads_and_neighbours_do_not_change_bits() -> None:
    n, k, group = 300, 512, 64
    codes, *rest = weight(n, k, group)
    repacked = OPS.repack_weight(int4.pack_int4(codes), 4)
    a, a_scale = activations(50, k)
    options = *rest, None, group, torch.bfloat16
    want = linear.integer_group_matmul(a, a_scale, codes, *options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (slice(0, 50), slice(7, 8), slice(11, 40)):
                got = OPS.integer_group_matmul(a[rows], a_scale[rows], repacked, *options)
                assert_same_bits(got, want[rows])
    finally:
        torch.set_num_threads(threads)


def test_poisoned_scales_stay_in_their_row(isa: str) -> None:
    codes, multiplier, scale = weight(40, 64, 16)
    scale[3] = float("nan")
    a, a_scale = activations(4, 64)
    a_scale[2] = float("nan")
    for w in forms(codes):
        y = OPS.integer_group_matmul(a, a_scale, w, multiplier, scale, None, 16, torch.float32)
        bad = torch.zeros(4, 40, dtype=torch.bool)
        bad[2], bad[:, 3] = True, True
        assert torch.equal(y.isnan(), bad)


def test_empty_operands(isa: str) -> None:
    for m, n, groups in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        a = torch.zeros(m, groups * 4, dtype=torch.int8)
        codes = torch.zeros(n, groups * 4, dtype=torch.int8)
        multiplier = torch.ones(n, groups, dtype=torch.uint8)
        y = OPS.integer_group_matmul(
            a, torch.ones(m), codes, multiplier, torch.ones(n), None, 4, torch.float32
        )
        assert torch.equal(y, torch.zeros(m, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_equals_the_spec(isa: str, dtype: torch.dtype) -> None:
    """Rows of many sizes of values; of zeros, a NaN, an infinity; groups of zeros and denormals."""
    for columns, group in ((1, 1), (6, 2), (35, 5), (96, 32), (150, 50), (64, 64)):
        x = torch.randn(200, columns, generator=generator(columns))
        x *= 10.0 ** torch.linspace(-36, 36, 200)[:, None]
        x *= torch.logspace(-3, 0, columns)
        x[::11], x[1::11, :group], x[2::11, -1] = 0, 0, 1e-40
        x[3, 0], x[4, -1] = float("nan"), float("-inf")
        x = x.to(dtype)
        for bits in (2, 3, 4):
            got = OPS.quantize_integer_groups(x.view(4, 50, columns), bits, group)
            want = quantize.quantize_integer_groups(x.view(4, 50, columns), bits, group)
            for one, other in zip(got, want, strict=True):
                assert_same_bits(one, other, f"{columns} columns, groups of {group}, {bits} bits")


def test_quantize_refuses() -> None:
    x = torch.ones(2, 8)
    for change, words in (
        ({"bits": 5}, "bits: integer groups hold 2 to 4 bits, got 5"),
        ({"group": 0}, "group_size: expected a positive size"),
        ({"group": 3}, "group_size"),
        ({"x": x.double()}, "x: "),
    ):
        arguments: dict[str, object] = {"x": x, "bits": 4, "group": 4} | change
        with pytest.raises(RuntimeError, match=words):
            OPS.quantize_integer_groups(*arguments.values())
    codes, multiplier, scale = OPS.quantize_integer_groups(torch.empty(0, 8), 4, 4)
    assert codes.shape == (0, 8) and multiplier.shape == (0, 2) and scale.shape == (0,)


A, A_SCALE = activations(2, 8)
W = weight(3, 8, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": A.float()}, "a: expected int8"),
        ({"a": A[:, :7]}, "a: expected 8 columns in groups of 4, got 7"),
        ({"a": torch.zeros(2, 5, dtype=torch.uint8)}, "a: expected 4 packed bytes a row, got 5"),
        ({"a_scale": torch.ones(3)}, "a_scale: expected one value a row"),
        ({"w": W[0][:2]}, "w: expected 3 rows"),
        ({"w": W[0][:, :4]}, "w: expected size 8"),
        ({"w": torch.zeros(640, dtype=torch.uint8)}, "w: not a weight made by repack_weight"),
        ({"w": OPS.repack_weight(W[0][:2], 4)}, "n: the repacked weight has 2 rows, got 3"),
        ({"multiplier": W[1].int()}, "w_multiplier: expected uint8"),
        ({"multiplier": W[1][0]}, "w_multiplier: expected 2 dimensions"),
        ({"scale": torch.ones(3, 2)}, "w_scale: expected 1 dimensions"),
        ({"bias": torch.ones(4)}, "bias: expected size 3"),
        ({"group": 0}, "group_size: expected a positive size"),
        ({"group": 2**62}, "could overflow int32"),
        ({"dtype": torch.float64}, "dtype: "),
    ],
)
def test_bad_arguments(change: dict[str, object], words: str) -> None:
    arguments = {
        "a": A, "a_scale": A_SCALE, "w": W[0], "multiplier": W[1], "scale": W[2], "bias": None,
        "group": 4, "dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        OPS.integer_group_matmul(*(arguments | change).values())
