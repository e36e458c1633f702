"""attention_decode on the Triton backend: spec 9, by the 2x rule, and what is exact about it."""

import pytest
import torch

from llmqat_kernels import InvalidArgument, InvalidArgumentType
from llmqat_kernels.backends.triton import attention_decode as kernels
from llmqat_kernels.backends.triton.attention_decode import (
    SPLIT,
    block_tokens,
    fits,
    half_block,
)
from llmqat_kernels.spec import attention as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, assert_within_ratio, generator
from tests.kernels.kv_cases import MODES, poison
from tests.kernels.test_attention_decode_spec import case, exact

from .device import run
from .guard import guard_bands, poisoned

SHORT = {"lengths": (40, 1, 0, 33), "tokens": 41}


def attend(args):
    return run("attention_decode", *args)


def assert_close(args):
    with guard_bands():
        got = attend(args)
    assert_within_ratio(got, spec.attention_decode(*args), exact(args), 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [6, 64])
def test_within_the_ratio_of_plain_torch(dtype, mode, bits, head_dim):
    assert_close(case(bits, mode, head_dim, dtype, **SHORT))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [2, 18, 34, 80, 96, 128])
def test_any_even_head_dim(bits, head_dim):
    assert_close(case(bits, "paper", head_dim, torch.float32, lengths=(33, 2), tokens=34))


@pytest.mark.parametrize("repeats", [1, 5, 16, 17])
def test_grouped_query_heads(repeats):
    assert_close(case(8, "serving", 16, torch.bfloat16, repeats, lengths=(9, 20), tokens=20))


@pytest.mark.parametrize("mode, bits", [("paper", 8), ("serving", 4), ("serving", 16)])
def test_several_splits(mode, bits):
    lengths = (SPLIT, SPLIT + 1, 2 * SPLIT + 70)
    assert_close(case(bits, mode, 16, torch.bfloat16, lengths=lengths, tokens=3 * SPLIT))


def test_queries_in_parts_change_no_bit(monkeypatch):
    lengths = (SPLIT, 3, 2 * SPLIT, 0, SPLIT + 1)
    args = case(8, "paper", 16, torch.bfloat16, lengths=lengths, tokens=2 * SPLIT)
    want = attend(args)
    monkeypatch.setattr(kernels, "MAX_SUMS", 1)
    counted = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *a, **k: (counted.append(a[1][0]), launch(*a, **k))
    )
    assert_same_bits(attend(args), want)
    assert counted == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("heads", "tokens", "queries"), [(32, 2048, 2048), (32, 131_072, 32), (128, 2**22, 2)]
)
def test_partial_sums_stay_in_their_limit(heads, tokens, queries):
    splits = tokens // SPLIT
    assert kernels.queries_at_once(heads, splits, 128) == queries
    assert queries == 2 or 4 * queries * heads * splits * 128 <= kernels.MAX_SUMS


@pytest.mark.parametrize("bits", [2, 5, 7])
def test_other_widths_in_int8_caches(bits):
    args = case(8, "serving", 16, torch.float32, **SHORT)
    args[10] = bits  # codes of fewer bits are read the same way
    want = spec.attention_decode(*args)
    assert_within_ratio(attend(args), want, want.double(), 2.0)


@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float16])
def test_float_caches_of_half_width(float_dtype):
    args = case(16, "serving", 64, torch.float32, **SHORT)
    args[1], args[3] = args[1].to(float_dtype), args[3].to(float_dtype)
    assert_close(args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bytes_beyond_the_length_change_no_bit(bits, mode):
    results = [
        attend(case(bits, mode, 64, torch.bfloat16, kind=kind, **SHORT))
        for kind in ("zero", "nan", "random")
    ]
    assert results[0].isfinite().all()
    for result in results[1:]:
        assert_same_bits(result, results[0])
    assert (results[0] == 0).all(-1).all(-1).sum() == 1  # the slot of length 0


def test_a_longer_cache_changes_no_bit():
    """Splits have a fixed size: a cache with room for more gives the same bits."""
    short = case(8, "serving", 16, torch.bfloat16, **SHORT)
    long = case(8, "serving", 16, torch.bfloat16, lengths=SHORT["lengths"], tokens=3 * SPLIT)
    assert_same_bits(attend(long), attend(short))


@pytest.mark.parametrize("mode", MODES)
def test_prefill_shares_a_slot_and_each_query_is_as_alone(mode):
    """Lengths 1, 2, 3, ... of one slot are causal prefill; later tokens stay unseen, NaN or not."""
    n = 35
    args = case(8, mode, 16, torch.bfloat16, lengths=(n,), tokens=n)
    chosen = torch.tensor([0, 1, 15, 31, 34])
    q = torch.randn(5, 6, 16, generator=generator(3)).to(torch.bfloat16)
    slots = torch.zeros(5, dtype=torch.int64)
    together = attend([q, *args[1:7], slots, chosen + 1, *args[9:]])
    for i, last in enumerate(chosen.tolist()):
        cache = [t.clone() for t in args[1:5]]
        for t in cache:
            poison(t[:, last + 1 :] if t.dim() == 2 else t[:, :, last + 1 :], "nan")
        alone = attend(
            [q[i : i + 1], *cache, *args[5:7], slots[:1], chosen[i : i + 1] + 1, *args[9:]]
        )
        assert_same_bits(together[i : i + 1], alone, f"query {last}")


def test_queries_of_a_wider_projection():
    args = case(8, "serving", 16, torch.bfloat16, **SHORT)
    want = attend(args)
    args[0] = torch.cat((args[0], args[0]), dim=1)[:, : args[0].shape[1]]
    assert_same_bits(attend(args), want)


def test_misaligned_caches():
    args = case(4, "paper", 16, torch.bfloat16, **SHORT)
    want = attend(args)
    for i in (1, 2, 3, 4, 5, 6):
        args[i] = poisoned(args[i], 1)
    assert_same_bits(attend(args), want)


@pytest.mark.parametrize("mode", MODES)
def test_a_poisoned_token_within_the_length_shows(mode):
    args = case(8, mode, 16, torch.float32, lengths=(5,), tokens=5)
    for scale in (2, 4):
        poisoned_args = list(args)
        poisoned_args[scale] = args[scale].clone()
        poisoned_args[scale][..., 2] = float("nan")
        assert attend(poisoned_args).isnan().all()


def test_slots_and_lengths_outside_the_cache_give_nan():
    args = case(8, "serving", 16, torch.float32, **SHORT)
    args[7], args[8] = torch.tensor([4, -1, 0, 0]), torch.tensor([3, 3, 42, -1])
    assert attend(args).isnan().all()


def test_large_scores_do_not_overflow():
    args = case(16, "serving", 64, torch.float32, lengths=(40,), tokens=40)
    args[1] *= 1000
    assert_close(args)


@pytest.mark.parametrize("factor", [2.0**-16, 2.0**13])
def test_fp16_keeps_its_precision_with_extreme_scales(factor):
    """p * v_scale alone would underflow, or overflow, in fp16."""
    args = case(8, "serving", 64, torch.float16, lengths=(40, 3), tokens=40)
    args[4] = args[4] * factor
    got, want = attend(args).double(), exact(args)
    assert ((got - want).abs() <= 2e-3 * want.abs().max() + 2.0**-24).all()


def test_empty_batch():
    args = case(8, "paper", 16, torch.float32, **SHORT)
    none = torch.zeros(0, dtype=torch.int64)
    assert attend([args[0][:0], *args[1:7], none, none, *args[9:]]).shape == (0, 6, 16)


def test_bad_arguments_name_the_argument():
    good = case(8, "paper", 16, torch.float32, **SHORT)
    for error, message, index, value in [
        (InvalidArgument, "q: 5 heads", 0, torch.randn(4, 5, 16)),
        (InvalidArgument, "k_codes: expected shape", 1, good[1][..., :8].contiguous()),
        (InvalidArgument, "k_scale: expected shape", 2, good[2][:, :7].contiguous()),
        (InvalidArgumentType, "v_codes: dtype", 3, good[3].to(torch.uint8)),
        (InvalidArgument, "cos: expected shape", 5, good[5][:, :3]),
        (InvalidArgumentType, "slots: dtype", 7, good[7].int()),
        (InvalidArgument, "lengths: expected shape", 8, good[8][:2]),
    ]:
        args = list(good)
        args[index] = value
        with pytest.raises(error, match=message):
            attend(args)


def test_tiles():
    assert [half_block(h) for h in (1, 16, 17, 40, 64, 65)] == [32, 32, 32, 64, 64, 128]
    for dtype in DTYPES:
        for per_token in (False, True):
            for half in (1, 32, 40, 64, 65, 128):
                for regular in (False, True):
                    assert SPLIT % block_tokens(dtype, half, per_token, regular) == 0


def test_what_does_not_fit_the_registers_is_refused():
    assert [fits(torch.float32, half) for half in (33, 64, 65, 66)] == [True, True, False, True]
    assert all(fits(torch.bfloat16, half) for half in (33, 65))
