"""Integer group scales (spec 18) against numbers worked out by hand, on every backend."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import linear, quantize
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator


def row(*groups):
    return torch.tensor([[value for group in groups for value in group]])


def test_scale_and_multipliers_by_hand(backend):
    """Group maxima 441, 7 and 0 on the 4-bit grid: fine scales 63, 1 and none, so s = 1."""
    x = row((441.0, -63.0, 0.0, 31.0), (7.0, -3.5, 2.5, 1.0), (0.0, 0.0, 0.0, 0.0))
    codes, multiplier, scale = qk.quantize_integer_groups(x, 4, group_size=4)
    assert scale.tolist() == [1.0]
    assert multiplier.tolist() == [[63, 1, 1]]
    # 31 / 63 rounds to 0; -3.5 and 2.5 are ties, which go to the even code.
    assert codes.tolist() == [[7, -1, 0, 0, 7, -4, 2, 1, 0, 0, 0, 0]]


def test_small_groups_take_at_least_one_step_of_the_scale(backend):
    """A group 1000 times smaller than the largest: its own scale would be 0.063, s is 1."""
    x = row((441.0, 0.0), (0.441, 0.6))
    codes, multiplier, scale = qk.quantize_integer_groups(x, 4, group_size=2)
    assert scale.tolist() == [1.0] and multiplier.tolist() == [[63, 1]]
    assert codes.tolist() == [[7, 0, 0, 1]]


def test_multipliers_are_rounded_up(backend):
    """Fine scales 63, 1.0625, 2 and 2.5 at s = 1: no group's largest value lies beyond its grid."""
    x = row((441.0, 0.0), (7.4375, 6.0), (14.0, 7.0), (17.5, 1.0))
    codes, multiplier, scale = qk.quantize_integer_groups(x, 4, group_size=2)
    assert scale.tolist() == [1.0] and multiplier.tolist() == [[63, 2, 2, 3]]
    assert codes.tolist() == [[7, 0, 4, 3, 7, 4, 6, 0]]


def test_zero_and_poisoned_rows(backend):
    x = torch.zeros(3, 4)
    x[1] = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    x[2] = torch.tensor([float("inf"), 2.0, 3.0, 4.0])
    codes, multiplier, scale = qk.quantize_integer_groups(x, 4, group_size=2)
    assert scale[0] == 1.0 and scale[1:].isnan().all()
    assert multiplier.tolist() == [[1, 1]] * 3 and not codes.any()


def test_product_by_hand(backend):
    """(1*2 + 2*3) * 5 + (3*-1 + 4*7) * 2 = 40 + 50; times 0.5 * 0.25, plus 1."""
    a = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
    w = torch.tensor([[2, 3, -1, 7]], dtype=torch.int8)
    multiplier = torch.tensor([[5, 2]], dtype=torch.uint8)
    scales = torch.tensor([0.5]), torch.tensor([0.25])
    for weight in (w, qk.pack_int4(w)):
        y = qk.integer_group_matmul(
            a, scales[0], weight, multiplier, scales[1], torch.tensor([1.0]), group_size=2
        )
        assert y.tolist() == [[90 * 0.125 + 1]]


def test_longest_exact_sum(backend):
    """63 * 7 * 127 * K at the largest K, where fp32 sums would have lost the last bits."""
    k = 38_342
    a = torch.full((1, k), 127, dtype=torch.int8)
    a[0, 0] = 126
    w = torch.full((1, k), 7, dtype=torch.int8)
    multiplier = torch.full((1, 2), 63, dtype=torch.uint8)
    one = torch.ones(1)
    y = qk.integer_group_matmul(a, one, w, multiplier, one, group_size=k // 2)
    want = torch.tensor(63 * 7 * (127 * k - 1), dtype=torch.int32).to(torch.float32)
    assert_same_bits(y, want.view(1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_spec(backend, dtype, bits):
    x = torch.randn(5, 96, generator=generator(1)) * torch.logspace(-3, 2, 96)
    for group_size in (1, 3, 32, 96):
        got = qk.quantize_integer_groups(x.to(dtype), bits, group_size=group_size)
        want = quantize.quantize_integer_groups(x.to(dtype), bits, group_size)
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other, f"group_size {group_size}")


@pytest.mark.parametrize("group_size", [1, 3, 10, 30])
def test_product_equals_spec(backend, group_size):
    a, a_scale = qk.quantize(torch.randn(3, 30, generator=generator(1)), 8)
    w = quantize.quantize_integer_groups(torch.randn(7, 30, generator=generator(2)), 4, group_size)
    bias = torch.randn(7, generator=generator(3)).to(torch.bfloat16)
    want = linear.integer_group_matmul(a, a_scale, *w, bias, group_size, torch.bfloat16)
    for codes in (w[0], qk.pack_int4(w[0])):
        got = qk.integer_group_matmul(
            a, a_scale, codes, *w[1:], bias, group_size=group_size, dtype=torch.bfloat16
        )
        assert_same_bits(got, want)


@pytest.mark.parametrize("group_size", [3, 8])
def test_packed_activations_give_the_same_bits(backend, group_size):
    """W4A4: the packed form of 4-bit codes, K odd and even."""
    k = 3 * group_size
    a, a_scale = qk.quantize(torch.randn(2, 3, k, generator=generator(1)), 4)
    w = quantize.quantize_integer_groups(torch.randn(5, k, generator=generator(2)), 4, group_size)
    want = qk.integer_group_matmul(a, a_scale, *w, group_size=group_size)
    for codes in (w[0], qk.pack_int4(w[0])):
        got = qk.integer_group_matmul(
            qk.pack_int4(a), a_scale, codes, *w[1:], group_size=group_size
        )
        assert_same_bits(got, want)


def test_packed_activations_of_another_length(backend):
    w = quantize.quantize_integer_groups(torch.randn(5, 8), 4, 4)
    with pytest.raises(qk.InvalidArgument, match="a: expected shape"):
        qk.integer_group_matmul(
            torch.zeros(2, 5, dtype=torch.uint8), torch.ones(2), *w, group_size=4
        )


def test_bad_arguments(backend):
    with pytest.raises(qk.InvalidArgument, match="bits"):
        qk.quantize_integer_groups(torch.ones(1, 4), 8, group_size=2)
    with pytest.raises(qk.InvalidArgument, match="group_size"):
        qk.quantize_integer_groups(torch.ones(1, 4), 4, group_size=-1)
    with pytest.raises(qk.InvalidArgument, match="group_size"):
        qk.quantize_integer_groups(torch.ones(1, 4), 4, group_size=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a_scale": torch.ones(2).double()}, "a_scale: dtype"),
        ({"a_scale": [1.0, 1.0]}, "a_scale: expected a torch.Tensor"),
        ({"a_scale": torch.ones(2, device="meta")}, "a_scale: is on meta"),
        ({"dtype": torch.int8}, "dtype: torch.int8"),
        ({"dtype": torch.float64}, "dtype: torch.float64"),
    ],
)
def test_bad_operands_of_the_product(backend, change, words):
    codes, multiplier, scale = qk.quantize_integer_groups(torch.randn(3, 64), 4, group_size=16)
    a, a_scale = qk.quantize(torch.randn(2, 64), 8)
    arguments = {"a": a, "a_scale": a_scale, "w": codes, "w_multiplier": multiplier}
    with pytest.raises((qk.InvalidArgument, qk.InvalidArgumentType), match=words):
        qk.integer_group_matmul(**(arguments | {"w_scale": scale, "group_size": 16} | change))


def test_rows_without_columns(backend):
    codes, multiplier, scale = qk.quantize_integer_groups(torch.ones(2, 0), 4, group_size=4)
    assert codes.shape == multiplier.shape == (2, 0)
    assert codes.dtype == torch.int8 and multiplier.dtype == torch.uint8
    assert_same_bits(scale, torch.ones(2))


def test_what_is_cut_of_the_largest_values(backend):
    """Only what rounding of the row's scale, and the limit of 63, leave out."""
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2))
    _, multiplier, scale = qk.quantize_integer_groups(x, 4, group_size=16)
    largest = x.view(2000, 4, 16).abs().amax(-1)
    assert bool((largest <= 7 * 1.004 * (multiplier * scale[:, None])).all())


def test_sums_out_of_range_wrap_alike(backend):
    """Codes of more than 4 bits are the caller's mistake; no backend makes of it anything else."""
    a = torch.full((1, 4096), 127, dtype=torch.int8)
    multiplier = torch.full((1, 64), 63, dtype=torch.uint8)
    ones = torch.ones(1)
    got = qk.integer_group_matmul(a, ones, a.clone(), multiplier, ones, group_size=64)
    total = 63 * 127 * 127 * 4096
    assert float(got) == torch.tensor((total + 2**31) % 2**32 - 2**31).float()
