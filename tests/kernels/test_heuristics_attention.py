"""How the CUDA attention operators cut their work: host functions of the native build."""

import pytest

from llmqat_kernels.spec.paged import PAGE_TOKENS

host = pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")


def test_splits_cover_every_length_and_pages_never_straddle_one():
    assert host.PAGE_TOKENS == PAGE_TOKENS
    assert host.ATTENTION_SPLIT % PAGE_TOKENS == 0
    splits = [host.attention_splits(n) for n in (0, 1, 256, 257, 131072)]
    assert splits == [0, 1, 1, 2, 512]


def test_heads_of_a_block_divide_its_warps():
    heads = {n: host.attention_block_heads(n) for n in (1, 3, 4, 8, 16, 32, 40)}
    assert heads == {1: 1, 3: 1, 4: 2, 8: 2, 16: 4, 32: 4, 40: 4}
    assert all(8 % n == 0 for n in heads.values())


def test_tensor_cores_take_what_they_can():
    assert host.attention_uses_tensor_cores(True, True, 128, True)
    assert host.attention_uses_tensor_cores(True, True, 64, True)
    for wrong in ((False, True, 64, True), (True, False, 64, True), (True, True, 80, True)):
        assert not host.attention_uses_tensor_cores(*wrong)
    assert not host.attention_uses_tensor_cores(True, True, 128, False)


def test_workspace_and_threads():
    assert host.attention_workspace_bytes(2, 32, 128, 2048) == 2 * 32 * 8 * 130 * 4
    assert [host.append_threads(n, 8) for n in (2, 256, 264, 4096, 10**6)] == [
        *(32, 32, 64),
        *(256, 256),
    ]
