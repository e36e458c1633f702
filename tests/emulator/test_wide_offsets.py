"""Addresses past 2^31 bytes: a page far inside a pool of which only the touched pages exist."""

import ctypes
import mmap
import tempfile

import pytest
import torch

from llmqat_kernels.spec import attention, rope
from llmqat_kernels.testing import assert_within_ratio
from tests.emulator.build import compile_kernel
from tests.emulator.kv import (
    DTYPES,
    PAGE,
    STORAGE,
    WHOLE,
    Append,
    Attention,
    KvCache,
    heads_of,
    tables_of,
)
from tests.emulator.memory import guard, poisoned
from tests.kernels.kv_cases import tables
from tests.kernels.test_attention_decode_spec import exact

pytestmark = pytest.mark.emulator

HEADS, DIM, FAR, BLOCKS = 2, 64, 300_000, 300_001
TOKENS = 3


def sparse(dtype, *shape):
    """A tensor of zeros on a file of holes; only touched pages take space."""
    size = torch.Size(shape).numel() * dtype.itemsize
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)


@pytest.fixture(scope="module")
def pools():
    """k, k_scale, v, v_scale of a pool: k and v of 2.5 GB each, mostly not there."""
    codes = [sparse(torch.int8, BLOCKS, HEADS, PAGE, DIM) for _ in range(2)]
    scales = [sparse(torch.float32, BLOCKS, PAGE) for _ in range(2)]
    assert codes[0][:FAR].numel() > 2**31
    return codes[0], scales[0], codes[1], scales[1]


def test_append_and_attend_on_a_far_page(pools):
    table = guard(torch.tensor([[FAR]], dtype=torch.int32))
    k_codes, k_scale, v_codes, v_scale = pools
    struct = KvCache(
        *(t.data_ptr() for t in (k_codes, v_codes, k_scale, v_scale)), table.pointer,
        1, 1, BLOCKS, HEADS, PAGE, DIM, STORAGE[torch.int8], 8, True,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, TOKENS, HEADS, DIM, generator=random).to(torch.float16)
    slots, positions = torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS)
    cos, sin = tables(PAGE, DIM)
    near = [torch.zeros_like(t[:1]) for t in pools]
    rope.rope_quantize_append(k, v, cos, sin, *near, slots, positions, 8, True)

    rope_struct, kept = tables_of(cos, sin)
    (keys, own_k), (values, own_v) = heads_of(k), heads_of(v)
    index = [guard(slots), guard(positions)]
    written = Append(
        k=keys, v=values, slots=index[0].pointer, positions=index[1].pointer, n=TOKENS,
        dtype=DTYPES[k.dtype],
    )  # fmt: skip
    by = ctypes.byref
    append = compile_kernel("rope_quantize_append").llmqat_cuda_rope_quantize_append
    assert append(by(struct), by(written), by(rope_struct), None) == 0
    for pool, want in zip(pools, near, strict=True):
        assert torch.equal(pool[FAR], want[0])

    q = torch.randn(1, 4, DIM, generator=random).to(torch.float16)
    arguments = [q, *near, cos, sin, torch.tensor([0]), torch.tensor([TOKENS]), 0.125, 8, True]
    attend = compile_kernel("attention_decode").llmqat_cuda_attention_decode
    queries, own_q = heads_of(q)
    given = [guard(t) for t in arguments[7:9]]
    out, work = poisoned(q.shape, q.dtype), poisoned((4 * (DIM + 2),), torch.float32)
    problem = Attention(
        q=queries, slots=given[0].pointer, lengths=given[1].pointer, out=out.pointer,
        workspace=work.pointer, n=1, heads=4, max_length=PAGE, scaling=0.125, dtype=DTYPES[q.dtype],
        plan=WHOLE,
    )  # fmt: skip
    assert attend(by(struct), by(problem), by(rope_struct), None) == 0
    want = attention.attention_decode(*arguments)
    assert_within_ratio(out.check(), want, exact(arguments), 2.0)
    for each in (*kept, own_k, own_v, own_q):
        each.check()
