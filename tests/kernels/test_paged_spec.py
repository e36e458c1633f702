"""The paged KV cache: spec 9, against the contiguous operators."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import attention, paged, quantize, rope

from .kv_cases import MODES, empty_cache, fill, tables

ops = torch.ops.llmqat
LENGTHS = (70, 1, 129)


def case(bits, mode):
    """A contiguous cache, the pages it lies on in random order, and their table."""
    cache = empty_cache(3, 2, 192, 8, bits, mode, "zero")
    fill(rope.rope_quantize_append, cache, LENGTHS, 2, 8, bits, mode, torch.float32)
    table = torch.randperm(9, generator=torch.Generator().manual_seed(0)).view(3, 3).int()
    pools = []
    for t in cache:
        if t.numel():
            t = t.unflatten(1 if t.dim() == 2 else 2, (3, 64))
            t = t.flatten(0, 1) if t.dim() == 3 else t.transpose(1, 2).flatten(0, 1)
            t = t[torch.argsort(table.flatten().long())].clone()
        pools.append(t)
    return cache, pools, table


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_pages_hold_what_the_contiguous_cache_holds(bits, mode):
    cache, pools, table = case(bits, mode)
    for pool, want in zip(pools, cache, strict=True):
        assert torch.equal(paged.gather_pages(pool, table), want)
    where = torch.tensor([0, 2, 2]), torch.tensor([70, 129, 63])
    k, v = torch.randn(2, 3, 2, 8)
    pre_rope = mode == "paper" and bits != 16
    cos, sin = tables(192, 8)
    for append in (paged.rope_quantize_append_paged, ops.rope_quantize_append_paged):
        own, mine = [t.clone() for t in cache], [t.clone() for t in pools]
        rope.rope_quantize_append(k, v, cos, sin, *own, *where, bits, pre_rope)
        append(k, v, cos, sin, *mine, table, *where, bits, pre_rope)
        for pool, want in zip(mine, own, strict=True):
            assert torch.equal(paged.gather_pages(pool, table), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_append_with_queries_is_the_append_and_rope(bits, mode):
    cache, pools, table = case(bits, mode)
    where = torch.tensor([0, 2, 2]), torch.tensor([70, 129, 63])
    q, (k, v) = torch.randn(3, 4, 8), torch.randn(2, 3, 2, 8)
    rest = *where, bits, mode == "paper" and bits != 16
    cos, sin = tables(192, 8)
    want = [t.clone() for t in cache]
    rope.rope_quantize_append(k, v, cos, sin, *want, *rest)
    for append in (paged.rope_quantize_append_queries, ops.rope_quantize_append_queries):
        own, mine = [t.clone() for t in cache], [t.clone() for t in pools]
        rotated = append(q, k, v, cos, sin, *own, None, *rest)
        assert torch.equal(rotated, rope.rope(q, cos, sin, where[1]))
        assert torch.equal(append(q, k, v, cos, sin, *mine, table, *rest), rotated)
        for pool, one, other in zip(mine, own, want, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(paged.gather_pages(pool, table), other)


@pytest.mark.parametrize("mode", MODES)
def test_attention_over_pages_and_the_codes_of_its_rows(mode):
    cache, pools, table = case(8, mode)
    lengths = torch.tensor(LENGTHS)
    table[1, 1:] = -1  # of no token
    q, slots = torch.randn(3, 4, 8), torch.arange(3)
    place = (*tables(192, 8), slots, lengths)
    kind = 0.3, 8, mode == "paper"
    want = attention.attention_decode(q, *cache, *place, *kind)
    codes = quantize.quantize(want.flatten(1), 8)
    assert torch.equal(paged.attention_decode_paged(q, *pools, table, *place, 129, *kind), want)
    got = paged.attention_decode_quantize(q, *pools, table, *place, 129, *kind, 8)
    for g, w in zip(got, (want, *codes), strict=True):
        assert torch.equal(g, w)
    with qk.use_backend("auto"):
        want = ops.attention_decode(q, *cache, *place, *kind)
        assert torch.equal(ops.attention_decode_paged(q, *pools, table, *place, 129, *kind), want)
        for held, pages in ((cache, None), (pools, table)):
            out, got, scale = ops.attention_decode_quantize(q, *held, pages, *place, 129, *kind, 8)
            assert torch.equal(out, want)
            for g, w in zip((got, scale), ops.quantize(want.flatten(1), 8), strict=True):
                assert torch.equal(g, w)
