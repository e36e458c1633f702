"""The CUDA rope_quantize_append on the CPU: the bytes of spec 9, contiguous and paged."""

import ctypes

import pytest
import torch

from llmqat_kernels.spec import rope as spec
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.kv import DTYPES, Append, cache_of, gathered, heads_of, paged, tables_of, views
from tests.emulator.memory import guard, poisoned
from tests.kernels.kv_cases import MODES, empty_cache, tables

pytestmark = pytest.mark.emulator
TOKENS = 130


@pytest.fixture(scope="module")
def kernel():
    library = compile_kernel("rope_quantize_append")
    library.llmqat_cuda_rope_quantize_append.restype = ctypes.c_int
    return library


def rows(n, heads, head_dim, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, heads, head_dim, generator=random).to(dtype)


def append(kernel, k, v, cos, sin, cache, slots, positions, q=None):
    """The cache, with q (rotated queries, the cache)."""
    (keys, own_k), (values, own_v) = heads_of(k), heads_of(v)
    index = [guard(t) for t in (slots, positions)]
    table, own_tables = tables_of(cos, sin)
    queries, own_q = heads_of(k[:, :0] if q is None else q)
    rotated = poisoned((0,) if q is None else q.shape, k.dtype)
    problem = Append(
        k=keys,
        v=values,
        q=queries,
        q_out=None if q is None else rotated.pointer,
        slots=index[0].pointer,
        positions=index[1].pointer,
        n=k.shape[0],
        q_heads=0 if q is None else q.shape[1],
        dtype=DTYPES[k.dtype],
    )
    error = kernel.llmqat_cuda_rope_quantize_append(
        ctypes.byref(cache.struct), ctypes.byref(problem), ctypes.byref(table), None
    )
    assert error == 0
    for buffer in (own_k, own_v, own_q, *index, *own_tables):
        buffer.check()
    written = cache.check()
    return written if q is None else (rotated.check(), written)


def same(got, want):
    for g, w in zip(got, want, strict=True):
        if g.is_floating_point():
            assert torch.equal(g.isnan(), w.isnan())
            g, w = g.nan_to_num(), w.nan_to_num()
        assert torch.equal(g, w)


def check(kernel, k, v, bits, mode, slots, positions, float_dtype=torch.float32, is_paged=False):
    head_dim = k.shape[-1]
    pre_rope = mode == "paper" and bits != 16
    cos, sin = tables(TOKENS, head_dim)
    before = empty_cache(3, k.shape[1], TOKENS, head_dim, bits, mode, "random", float_dtype)
    want = [t.clone() for t in before]
    spec.rope_quantize_append(k, v, cos, sin, *want, slots, positions, bits, pre_rope)
    if is_paged:
        pools, table = paged(before, seed=3)
        cache = cache_of(pools, head_dim, bits, pre_rope, table)
        got = gathered(append(kernel, k, v, cos, sin, cache, slots, positions), table, TOKENS)
    else:
        cache = cache_of(before, head_dim, bits, pre_rope)
        got = append(kernel, k, v, cos, sin, cache, slots, positions)
    same(got, want)


SLOTS = torch.tensor([2, 0, 0])
POSITIONS = torch.tensor([129, 0, 64])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_bits_equal_spec_under_every_schedule(kernel, schedule, mode):
    kernel.use_schedule(schedule)
    k, v = rows(3, 3, 64, torch.bfloat16)
    check(kernel, k, v, 4, mode, SLOTS, POSITIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_bits_equal_spec(kernel, dtype, bits, mode, head_dim):
    kernel.use_schedule("shuffled")
    k, v = rows(3, 2, head_dim, dtype)
    k[1, 0, 1] = float("nan")
    v[2] = 0
    check(kernel, k, v, bits, mode, SLOTS, POSITIONS)
    check(kernel, k[:1], v[:1], bits, mode, SLOTS[:1], POSITIONS[:1], is_paged=True)


def moved(x, layout):
    """x [n, heads, D] with other strides: tokens inside heads, or heads at odd addresses."""
    n, heads, dim = x.shape
    if layout == "transposed":
        return torch.empty(heads, n, dim, dtype=x.dtype).transpose(0, 1).copy_(x)
    base = torch.full((n, heads, dim + 3), float("nan"), dtype=x.dtype)
    return base[:, :, 1 : 1 + dim].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", MODES)
def test_strides_change_no_bit(kernel, dtype, bits, mode):
    """Views of one product, as the engine has them, and layouts that only a scalar load reads."""
    kernel.use_schedule("shuffled")
    k, v = views(3, (2, 2), 64, dtype)
    assert not k.is_contiguous()
    for x in ((k, v), *((moved(k, one), moved(v, one)) for one in ("transposed", "odd"))):
        check(kernel, *x, bits, mode, SLOTS, POSITIONS)


def test_strides_of_rows_wider_than_the_registers(kernel):
    kernel.use_schedule("forward")
    k, v = views(1, (72, 72), 128, torch.bfloat16)
    check(kernel, k, v, 8, "paper", SLOTS[:1], POSITIONS[:1])
    k, v = (moved(x, "odd") for x in (k, v))
    check(kernel, k, v, 4, "paper", SLOTS[:1], POSITIONS[:1])


@pytest.mark.parametrize("float_dtype", [torch.bfloat16, torch.float16])
def test_half_width_float_cache(kernel, float_dtype):
    k, v = rows(2, 1, 64, torch.float32)
    check(kernel, k, v, 16, "serving", SLOTS[:2], POSITIONS[:2], float_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(12, 3, 64), (2, 1, 6), (5, 5, 128)])
def test_queries_on_the_way(kernel, dtype, bits, mode, heads, kv_heads, head_dim):
    """Views of one product: the queries of `rope`, and the cache of the append alone."""
    kernel.use_schedule("shuffled")
    q, k, v = views(3, (heads, kv_heads, kv_heads), head_dim, dtype)
    cos, sin = tables(TOKENS, head_dim)
    before = empty_cache(3, kv_heads, TOKENS, head_dim, bits, mode, "random")
    caches = [cache_of(before, head_dim, bits, mode == "paper" and bits != 16) for _ in range(3)]

    def run(cache, *qs):
        return append(kernel, k, v, cos, sin, cache, SLOTS, POSITIONS, *qs)

    alone = run(caches[0])
    want = spec.rope(q, cos, sin, POSITIONS)
    for cache, one in zip(caches[1:], (q, q.contiguous()), strict=True):
        rotated, written = run(cache, one)
        assert torch.equal(rotated, want)
        same(written, alone)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_queries_under_every_schedule(kernel, schedule, mode):
    kernel.use_schedule(schedule)
    q, k, v = views(2, (6, 3, 3), 64, torch.bfloat16)
    cos, sin = tables(TOKENS, 64)
    cache = cache_of(empty_cache(3, 3, TOKENS, 64, 8, mode, "random"), 64, 8, mode == "paper")
    rotated, _ = append(kernel, k, v, cos, sin, cache, SLOTS[:2], POSITIONS[:2], q)
    assert torch.equal(rotated, spec.rope(q, cos, sin, POSITIONS[:2]))


@pytest.mark.parametrize("mode", MODES)
def test_queries_of_places_outside(kernel, mode):
    """Rotated by their positions, whether or not the cache has the place; NaN past the tables."""
    q, k, v = views(4, (4, 2, 2), 64, torch.float16)
    cos, sin = tables(TOKENS, 64)
    before = empty_cache(3, 2, TOKENS - 5, 64, 8, mode, "random")
    cache = cache_of(before, 64, 8, mode == "paper")
    slots, positions = torch.tensor([3, 0, 0, 0]), torch.tensor([7, TOKENS - 1, TOKENS, -1])
    rotated, written = append(kernel, k, v, cos, sin, cache, slots, positions, q)
    same(written, before)
    assert torch.equal(rotated[:2], spec.rope(q[:2], cos, sin, positions[:2]))
    assert rotated[2:].isnan().all()


def test_rows_wider_than_the_registers(kernel):
    kernel.use_schedule("forward")
    k, v = rows(1, 72, 128, torch.bfloat16)
    check(kernel, k, v, 8, "paper", SLOTS[:1], POSITIONS[:1])


def test_places_outside_are_not_written(kernel):
    k, v = rows(4, 2, 64, torch.float16)
    cos, sin = tables(TOKENS, 64)
    before = empty_cache(3, 2, TOKENS, 64, 8, "serving", "random")
    slots, positions = torch.tensor([3, -1, 0, 0]), torch.tensor([0, 0, TOKENS, -1])
    for table in (None, torch.full((3, 3), 99, dtype=torch.int32)):
        cache = cache_of(before, 64, 8, False, table)
        same(append(kernel, k, v, cos, sin, cache, slots, positions), before)


def test_positions_past_the_tables_and_no_rows(kernel):
    k, v = rows(1, 1, 64, torch.float16)
    cos, sin = tables(5, 64)
    before = empty_cache(1, 1, 9, 64, 8, "serving", "random")
    cache = cache_of(before, 64, 8, False)
    one = torch.tensor([0])
    k_codes, k_scale, _, v_scale = append(kernel, k, v, cos, sin, cache, one, one + 5)
    assert k_scale[0, 0, 5].isnan() and (k_codes[0, 0, 5] == 0).all()
    assert not v_scale[0, 0, 5].isnan()
    append(kernel, k[:0], v[:0], cos, sin, cache, one[:0], one[:0])
