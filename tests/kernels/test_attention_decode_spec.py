"""attention_decode: spec 9, against float64 by the 2x rule, and what is exact about it."""

import pytest
import torch

from llmqat_kernels.spec import attention as spec
from llmqat_kernels.spec.rope import rope_quantize_append
from llmqat_kernels.testing import DTYPES, assert_same_bits, assert_within_ratio, generator

from .kv_cases import MODES, empty_cache, fill, poison, tables

native = torch.ops.llmqat_cpu
KV_HEADS = 2


def case(bits, mode, head_dim, dtype, repeats=3, lengths=(70, 1, 0, 129), tokens=130, kind="nan"):
    """(q, *cache, cos, sin, slots, lengths, scaling, bits, pre_rope), queries in shuffled slots."""
    cache = empty_cache(len(lengths), KV_HEADS, tokens, head_dim, bits, mode, kind)
    fill(rope_quantize_append, cache, lengths, KV_HEADS, head_dim, bits, mode, dtype)
    order = torch.randperm(len(lengths), generator=generator(1))
    q = torch.randn(len(lengths), KV_HEADS * repeats, head_dim, generator=generator(2)).to(dtype)
    own = torch.tensor(lengths)[order]
    return [
        q,
        *cache,
        *tables(tokens, head_dim),
        order,
        own,
        head_dim**-0.5,
        bits,
        mode == "paper" and bits != 16,
    ]


def exact(args):
    """The same attention in float64, from the exact values of the codes and scales."""
    q, k_codes, k_scale, v_codes, v_scale, cos, sin, slots, lengths, scaling, bits, pre_rope = args
    out = torch.zeros(q.shape, dtype=torch.float64)
    repeats = q.shape[1] // k_codes.shape[1]
    for i, (slot, n) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if n == 0:
            continue
        rows = []
        for codes, scale in ((k_codes, k_scale), (v_codes, v_scale)):
            x = codes[slot, :, :n]
            if bits == 4:
                low, high = (x & 15).to(torch.int8), (x >> 4).to(torch.int8)
                x = torch.stack((low, high), -1).flatten(-2)
                x = torch.where(x > 7, x - 16, x)
            x = x.double()
            if bits != 16:
                x = x * (scale[slot, :n] if pre_rope else scale[slot, :, :n]).double().unsqueeze(-1)
            rows.append(x)
        key, value = rows
        if pre_rope:
            x1, x2 = key.chunk(2, dim=-1)
            c, s = cos[:n].double(), sin[:n].double()
            key = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        scores = torch.einsum("hd,htd->ht", q[i].double(), key) * scaling
        out[i] = torch.einsum("ht,htd->hd", scores.softmax(-1), value)
    return out


def test_hand_written_numbers():
    # Two tokens of one head; scores 0 and ln 3 give weights 1/4 and 3/4.
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    v = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    q = torch.tensor([[[0.0, 1.0986123]]])
    none = torch.empty(0)
    one = torch.zeros(1, dtype=torch.int64)
    y = spec.attention_decode(q, k, none, v, none, none, none, one, one + 2, 1.0, 16, False)
    assert torch.allclose(y, torch.tensor([[[1.0, 6.0]]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_spec_and_native_within_the_ratio_of_plain_torch(isa, dtype, mode, bits, head_dim):
    args = case(bits, mode, head_dim, dtype)
    want = exact(args)
    plain = spec.attention_decode(*args)
    assert torch.allclose(plain.double(), want, rtol=0, atol={torch.float32: 2e-6}.get(dtype, 4e-2))
    assert_within_ratio(native.attention_decode(*args), plain, want, 2.0)


@pytest.mark.parametrize("repeats", [1, 2, 4, 5, 9])
def test_grouped_query_heads(isa, repeats):
    args = case(8, "paper", 64, torch.float32, repeats)
    want = exact(args)
    assert_within_ratio(native.attention_decode(*args), spec.attention_decode(*args), want, 2.0)


def test_more_query_heads_than_one_call_takes(isa):
    args = case(8, "serving", 16, torch.float32, repeats=70, lengths=(5, 0, 2, 3), tokens=8)
    assert_within_ratio(
        native.attention_decode(*args), spec.attention_decode(*args), exact(args), 2.0
    )


@pytest.mark.parametrize("head_dim", [2, 18, 32, 40, 80, 96, 256])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_any_even_head_dim(isa, bits, head_dim):
    args = case(bits, "paper", head_dim, torch.float32, lengths=(33, 1, 2, 64))
    assert_within_ratio(
        native.attention_decode(*args), spec.attention_decode(*args), exact(args), 2.0
    )


@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [6, 64])
def test_float_caches_of_half_width(isa, float_dtype, head_dim):
    args = case(16, "serving", head_dim, torch.float32)
    args[1], args[3] = args[1].to(float_dtype), args[3].to(float_dtype)
    assert_within_ratio(
        native.attention_decode(*args), spec.attention_decode(*args), exact(args), 2.0
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [6, 64])
def test_bytes_beyond_the_length_change_no_bit(isa, bits, mode, head_dim):
    lengths = (70, 1, 0, 129)
    results = [
        native.attention_decode(*case(bits, mode, head_dim, torch.float32, kind=k))
        for k in ("zero", "nan", "random")
    ]
    assert results[0].isfinite().all()
    for result in results[1:]:
        assert_same_bits(result, results[0])
    assert (results[0][torch.randperm(4, generator=generator(1)) == 2] == 0).all() and lengths[
        2
    ] == 0


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_prefill_shares_a_slot_and_each_query_is_as_alone(isa, bits):
    """Lengths 1, 2, 3, ... of one slot are causal prefill; later tokens stay unseen, NaN or not."""
    n = 75
    args = case(bits, "paper", 64, torch.float32, lengths=(n,), tokens=n)
    q = torch.randn(n, 6, 64, generator=generator(3))
    slots, lengths = torch.zeros(n, dtype=torch.int64), torch.arange(1, n + 1)
    together = native.attention_decode(q, *args[1:7], slots, lengths, *args[9:])
    for i in (0, 1, 16, 63, 64, 74):
        cache = [t.clone() for t in args[1:5]]
        for t in cache:
            if t.numel():
                poison(t[:, i + 1 :] if t.dim() == 2 else t[:, :, i + 1 :], "nan")
        alone = native.attention_decode(
            q[i : i + 1], *cache, *args[5:7], slots[:1], lengths[i : i + 1], *args[9:]
        )
        assert_same_bits(together[i : i + 1], alone, f"query {i}")


def test_a_longer_neighbour_may_hold_nan(isa):
    args = case(16, "serving", 64, torch.float32, lengths=(9,), tokens=9)
    args[3][0, :, 8] = float("nan")
    q = torch.randn(2, 6, 64, generator=generator(4))
    slots = torch.zeros(2, dtype=torch.int64)
    y = native.attention_decode(q, *args[1:7], slots, torch.tensor([8, 9]), *args[9:])
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_order_of_queries_does_not_matter(isa):
    args = case(8, "serving", 64, torch.bfloat16)
    y = native.attention_decode(*args)
    order = torch.tensor([2, 0, 3, 1])
    args[0], args[7], args[8] = args[0][order], args[7][order], args[8][order]
    assert_same_bits(native.attention_decode(*args), y[order])


@pytest.mark.parametrize("mode", MODES)
def test_a_poisoned_token_within_the_length_shows(isa, mode):
    args = case(8, mode, 64, torch.float32, lengths=(5,), tokens=5)
    args[2][..., 2] = float("nan")
    assert native.attention_decode(*args).isnan().all()
    assert spec.attention_decode(*args).isnan().all()


def test_large_scores_do_not_overflow(isa):
    args = case(16, "serving", 64, torch.float32, lengths=(100,), tokens=100)
    args[1] *= 1000
    assert_within_ratio(
        native.attention_decode(*args), spec.attention_decode(*args), exact(args), 2.0
    )


def test_empty_batch(isa):
    args = case(8, "paper", 64, torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    assert native.attention_decode(args[0][:0], *args[1:7], none, none, *args[9:]).shape == (
        0,
        6,
        64,
    )


def test_bad_arguments_name_the_argument(isa):
    good = case(8, "paper", 64, torch.float32)
    for message, index, value in [
        ("q: 5 heads", 0, torch.randn(4, 5, 64)),
        ("q: expected 3", 0, torch.randn(4, 64)),
        ("k_codes: ", 1, good[1][..., :32].contiguous()),
        ("k_scale: ", 2, good[2][:, :7].contiguous()),
        ("v_codes: ", 3, good[3].to(torch.uint8)),
        ("cos: expected at least 129 rows", 5, good[5][:100]),
        ("slots: 4", 7, torch.tensor([0, 1, 2, 4])),
        ("lengths: 131", 8, torch.tensor([0, 1, 2, 131])),
        ("lengths: -1", 8, torch.tensor([0, 1, 2, -1])),
        ("bits: expected 2 to 8", 10, 12),
    ]:
        args = list(good)
        args[index] = value
        with pytest.raises(RuntimeError, match=message):
            native.attention_decode(*args)
