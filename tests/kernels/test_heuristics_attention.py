"""How the CUDA attention operators cut their work: host functions of the native build."""

from itertools import product

import pytest

from llmqat_kernels.spec.paged import PAGE_TOKENS

host = pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")


def test_splits_cover_every_length_and_pages_never_straddle_one():
    assert host.PAGE_TOKENS == PAGE_TOKENS
    assert host.ATTENTION_SPLIT % PAGE_TOKENS == 0
    splits = [host.attention_splits(n) for n in (0, 1, 256, 257, 131072)]
    assert splits == [0, 1, 1, 2, 512]


HEADS = (1, 2, 3, 4, 5, 8, 15, 16, 32, 40)
DEVICES = (16, 108, 132, 148)


def plan(queries, heads, kv_heads, max_length, rotates=True, sms=132, head_dim=128):
    """(KV heads of a block, partial sums of a split, blocks)."""
    return host.attention_plan(queries, heads, kv_heads, head_dim, max_length, rotates, sms)[:3]


def test_the_model_alone_fixes_the_order_of_sums():
    assert [host.attention_parts(n) for n in HEADS] == [8, 8, 8, 4, 4, 4, 4, 2, 2, 2]
    assert host.ATTENTION_SPLIT == 256  # of every problem


@pytest.mark.parametrize("sms", DEVICES)
@pytest.mark.parametrize("rotates", [True, False])
def test_every_plan_has_all_parts_of_every_head(rotates, sms):
    for kv_heads, group, queries, tokens in product(HEADS, (1, 9), (1, 7, 64), (1, 300, 131072)):
        heads, pieces, blocks = plan(queries, kv_heads * group, kv_heads, tokens, rotates, sms)
        parts = host.attention_parts(kv_heads)
        assert pieces in (1, parts) and heads in (1, 2, 4, 8)
        assert heads * parts // pieces <= 8  # warps
        chunks = -(-group // 8)
        splits = host.attention_splits(tokens)
        assert blocks == queries * splits * pieces * chunks * -(-kv_heads // heads)


def test_small_problems_are_spread_over_the_device():
    """2k tokens at batch 1 were 64 blocks for 32 heads and 32 for 8: half of an H100 and less."""
    for rotates in (True, False):
        assert plan(1, 32, 32, 2048, rotates) == (4, 2, 128)
        assert plan(1, 32, 8, 2048, rotates) == (2, 4, 128)
        assert plan(1, 32, 32, 512, rotates) == (1, 2, 128)
        assert plan(1, 32, 32, 256, rotates) == (1, 2, 64)
    for kv_heads, tokens in product((4, 8, 16, 32), (1024, 2048, 4096)):
        assert plan(1, 32, kv_heads, tokens)[2] >= 64


def test_large_problems_move_the_fewest_bytes():
    # The tables of 8 heads instead of 4: 2048 bytes a token less, for 130 of partial sums.
    assert plan(64, 32, 32, 2048) == (8, 2, 64 * 16 * 4)
    assert plan(64, 32, 32, 2048, rotates=False) == (4, 1, 64 * 8 * 8)
    assert plan(64, 32, 8, 2048, rotates=False) == (2, 1, 64 * 8 * 4)
    assert plan(64, 32, 4, 2048) == (2, 1, 64 * 8 * 2)


def test_lanes_of_the_last_kernel():
    lanes = [host.attention_combine_lanes(n) for n in (0, 2048, 2049, 4097, 16385, 131072)]
    assert lanes == [1, 1, 2, 3, 8, 8]


def test_tensor_cores_take_what_they_can():
    assert host.attention_uses_tensor_cores(True, True, 128, True)
    assert host.attention_uses_tensor_cores(True, True, 64, True)
    for wrong in ((False, True, 64, True), (True, False, 64, True), (True, True, 80, True)):
        assert not host.attention_uses_tensor_cores(*wrong)
    assert not host.attention_uses_tensor_cores(True, True, 128, False)


def test_workspace_and_threads():
    pieces, _, size = host.attention_plan(2, 32, 32, 128, 2048, True, 132)[1:]
    assert size == 2 * 32 * 8 * pieces * 130 * 4
    assert [host.append_threads(n, 8) for n in (2, 256, 264, 4096, 10**6)] == [
        *(32, 32, 64),
        *(256, 256),
    ]
