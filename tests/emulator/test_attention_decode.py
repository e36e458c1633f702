"""The CUDA attention_decode on the CPU: the 2x rule, and to the bit where nothing may matter."""

import ctypes
import functools
from itertools import product

import pytest
import torch

from llmqat_kernels.spec import attention as spec
from llmqat_kernels.spec import quantize
from llmqat_kernels.spec.rope import rope_quantize_append
from llmqat_kernels.testing import assert_within_ratio
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.kv import (
    APART,
    AUTO,
    DTYPES,
    WHOLE,
    Attention,
    cache_of,
    heads_of,
    paged,
    tables_of,
    views,
)
from tests.emulator.memory import guard, poisoned
from tests.kernels.kv_cases import MODES, empty_cache, fill, tables
from tests.kernels.test_attention_decode_spec import exact

pytestmark = pytest.mark.emulator
KV_HEADS = 2
LENGTHS = (65, 1, 300, 0, 63, 64)
FORMS = tuple(product((64, 128), (4, 8), MODES))
"""Of the tensor core kernel: head dimension, bits, mode."""
HEADS = ((2, 3, 257), (16, 1, 257), (5, 9, 33))
"""KV heads and query heads of each: 8, 2 and 4 warps share the tokens of a split; tokens."""
WARPS = ((WHOLE, 132), (APART, 1), (APART, 132))
"""All parts of a head in a block; one part of 8 heads; of fewer, so that others only help."""


@pytest.fixture(scope="module")
def kernel():
    library = compile_kernel("attention_decode")
    library.llmqat_cuda_attention_decode.restype = ctypes.c_int
    return library


def case(bits, mode, head_dim, dtype, group, lengths, tokens=None, kind="nan", kv_heads=KV_HEADS):
    """The arguments of spec.attention_decode; a query of every slot, the last one first."""
    tokens = tokens or max(lengths)
    cache = empty_cache(len(lengths), kv_heads, tokens, head_dim, bits, mode, kind)
    fill(rope_quantize_append, cache, lengths, kv_heads, head_dim, bits, mode, dtype)
    slots = torch.arange(len(lengths)).flip(0)
    random = torch.Generator().manual_seed(5)
    q = torch.randn(len(slots), kv_heads * group, head_dim, generator=random).to(dtype)
    own = torch.tensor(lengths)[slots]
    pre_rope = mode == "paper" and bits != 16
    return [q, *cache, *tables(tokens, head_dim), slots, own, head_dim**-0.5, bits, pre_rope]


def attend(kernel, args, quantize_bits=None, table=None, max_length=None, plan=AUTO, sms=132):
    """out, or (out, codes, scale), of the launcher; every buffer lies on guarded pages."""
    q, *cache_tensors, cos, sin, slots, lengths, scaling, bits, pre_rope = args
    n, heads, dim = q.shape
    cache = cache_of(cache_tensors, dim, bits, pre_rope, table)
    if max_length is None:
        max_length = cache_tensors[0].shape[2] if table is None else table.shape[1] * 64
    rope, kept = tables_of(cos, sin)
    queries, own_q = heads_of(q)
    inputs = [own_q, *(guard(t) for t in (slots, lengths))]
    out = poisoned(q.shape, q.dtype)
    codes, scale = poisoned((n, heads * dim), torch.int8), poisoned((n,), torch.float32)
    tickets = poisoned((n,), torch.int32)
    problem = Attention(
        q=queries,
        slots=inputs[1].pointer,
        lengths=inputs[2].pointer,
        out=out.pointer,
        codes=None if quantize_bits is None else codes.pointer,
        codes_scale=scale.pointer,
        tickets=tickets.pointer,
        n=n,
        heads=heads,
        max_length=max_length,
        sms=sms,
        scaling=scaling,
        dtype=DTYPES[q.dtype],
        quantize_bits=quantize_bits or 0,
        plan=plan,
    )
    pointers = ctypes.byref(cache.struct), ctypes.byref(problem), ctypes.byref(rope)
    size = kernel.llmqat_cuda_attention_workspace
    size.restype = ctypes.c_int64
    work = poisoned((size(*pointers) // 4,), torch.float32)
    problem.workspace = work.pointer
    assert kernel.llmqat_cuda_attention_decode(*pointers, None) == 0
    for buffer in (work, tickets, *inputs, *kept):
        buffer.check()
    cache.check()
    if quantize_bits is None:
        return out.check()
    return out.check(), codes.check(), scale.check()


def assert_two_times_rule(kernel, args):
    got = attend(kernel, args)
    plain, want = spec.attention_decode(*args), exact(args)
    assert_within_ratio(got, plain, want, 2.0)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim, bits, mode",
    [*product((64, 128), (4, 8), MODES), (64, 16, "paper")],  # a float cache has one mode
)
def test_within_twice_the_error_of_plain_torch(kernel, dtype, mode, bits, head_dim):
    kernel.use_schedule("shuffled")
    group = 3 if head_dim == 64 else 4
    lengths = (300, 1, 0) if dtype != torch.float32 else (65, 1, 0)
    assert_two_times_rule(kernel, case(bits, mode, head_dim, dtype, group, lengths))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_lengths_around_a_page(kernel, mode, bits):
    kernel.use_schedule("reverse")
    assert_two_times_rule(kernel, case(bits, mode, 64, torch.bfloat16, 1, LENGTHS))


@pytest.mark.parametrize("group", [8, 9])
def test_query_heads_of_more_than_one_fragment(kernel, group):
    assert_two_times_rule(kernel, case(8, "paper", 64, torch.float16, group, (17,)))


def test_any_even_head_dimension(kernel):
    for bits in (4, 8):
        assert_two_times_rule(kernel, case(bits, "paper", 6, torch.bfloat16, 2, (33, 5)))


def test_extreme_scales_and_queries(kernel):
    """fp16 fragments must not overflow or lose a token whose values are tiny."""
    args = case(8, "serving", 64, torch.bfloat16, 2, (40,))
    args[0] = args[0] * 1e20
    args[2] = args[2] * 1e-20
    args[4] = args[4] * torch.logspace(-20, 20, 40)
    assert_two_times_rule(kernel, args)
    args[4] = args[4] * 1e-25
    assert_two_times_rule(kernel, args)


@functools.cache
def undisturbed(form, heads):
    """A case, and its result by blocks of the common kind, threads in their order."""
    head_dim, bits, mode = form
    kv_heads, group, tokens = heads
    args = case(bits, mode, head_dim, torch.bfloat16, group, (tokens,), kv_heads=kv_heads)
    library = compile_kernel("attention_decode")
    library.use_schedule("forward")
    return args, attend(library, args, 8, plan=WHOLE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads[:2])))
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_no_schedule_changes_a_bit(kernel, form, heads, schedule):
    """Nor how blocks are made of warps."""
    args, want = undisturbed(form, heads)
    kernel.use_schedule(schedule, seed=3)
    turn = SCHEDULES.index(schedule) + FORMS.index(form) + HEADS.index(heads)
    plan, sms = WARPS[turn % len(WARPS)]
    for g, w in zip(attend(kernel, args, 8, plan=plan, sms=sms), want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("plan, sms", WARPS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads[:2])))
def test_every_plan_keeps_the_rule_and_the_bits(kernel, heads, plan, sms):
    kernel.use_schedule("shuffled", seed=1)
    for number, form in enumerate(FORMS):
        if (number + HEADS.index(heads)) % 3:
            continue
        args, want = undisturbed(form, heads)
        got = attend(kernel, args, plan=plan, sms=sms)
        assert torch.equal(got, want[0])
        assert_within_ratio(got, spec.attention_decode(*args), exact(args), 2.0)


@pytest.mark.parametrize("plan, sms", WARPS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads, parts", [(2, 8), (5, 4)])
def test_parts_are_added_in_their_order(kernel, kv_heads, parts, mode, plan, sms):
    """The first two cancel, and leave nothing of what was added to them in between."""
    args = case(8, mode, 64, torch.float16, 1, (16 * parts,), kv_heads=kv_heads)
    k_codes, _, v_codes, v_scale = args[1:5]
    k_codes.zero_()  # equal weights
    v_codes[..., 16:32, :] = -v_codes[..., :16, :]
    v_scale.fill_(1)
    v_scale[..., :32] = 2.0**18
    want = v_codes[0, :, 32:].double().sum(1) / (16 * parts)
    got = attend(kernel, args, plan=plan, sms=sms)
    assert (got[0].double() - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_many_splits(kernel, mode):
    """More splits than one thread adds: their groups, and how many threads there are for them."""
    kernel.use_schedule("greedy")
    args = case(4, mode, 64, torch.float16, 1, (2500, 2048), kv_heads=1)
    want = assert_two_times_rule(kernel, args)
    pools, table = paged(args[1:5], seed=2)
    for plan, pages, last in ((WHOLE, 40, 2500), (APART, 40, 2500), (APART, 200, 12800)):
        wide = torch.full((2, pages), 2**30, dtype=torch.int32)
        wide[:, : table.shape[1]] = table
        given = [args[0], *pools, *args[5:]]
        got = attend(kernel, given, table=wide, max_length=last, plan=plan)
        assert torch.equal(got, want)


def test_more_splits_than_factors_are_kept(kernel):
    kernel.use_schedule("lagging")
    args = case(4, "serving", 64, torch.float16, 1, (257 * 256 - 100,), kv_heads=1)
    assert_two_times_rule(kernel, args)


def alone(kernel, args, other, i):
    """Query i, on a cache that holds something else where no token lies."""
    return attend(kernel, [args[0][i : i + 1], *other[1:7], *(t[i : i + 1] for t in args[7:9]),
                           *args[9:]])  # fmt: skip


@pytest.mark.parametrize(
    "form, heads, dtype",
    [
        *((form, heads, torch.float16) for form, heads in product(FORMS, ((2, 3), (16, 1)))),
        *(((64, 8, mode), (2, 2), torch.float32) for mode in MODES),
    ],
    ids=str,
)
def test_batch_pages_and_what_lies_beyond_change_no_bit(kernel, form, heads, dtype):
    kernel.use_schedule("greedy")
    head_dim, bits, mode = form
    kv_heads, group = heads
    lengths = (65, 20, 130) if kv_heads == 2 and dtype == torch.float16 else (65, 3)
    args, other = (
        case(bits, mode, head_dim, dtype, group, lengths, kind=kind, kv_heads=kv_heads)
        for kind in ("nan", "random")
    )
    want = attend(kernel, args)
    for i in range(len(lengths)):
        assert torch.equal(alone(kernel, args, other, i), want[i : i + 1])
    pools, table = paged(args[1:5], seed=1)
    table = torch.where(  # pages that no token of the slot lies on
        torch.arange(table.shape[1]) * 64 < torch.tensor(lengths)[:, None], table, 2**30
    ).to(torch.int32)
    given = [args[0], *pools, *args[5:]]
    for longest, plan in ((None, WHOLE), (max(lengths), APART)):
        assert torch.equal(attend(kernel, given, table=table, max_length=longest, plan=plan), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_the_output_row_are_those_of_quantize(kernel, dtype):
    kernel.use_schedule("lagging")
    args = case(8, "serving", 64, dtype, 2, (20, 0))
    out, codes, scale = attend(kernel, args, 8)
    assert torch.equal(out, attend(kernel, args))
    want_codes, want_scale = quantize.quantize(out.flatten(1), 8)
    assert torch.equal(codes, want_codes) and torch.equal(scale, want_scale)
    assert (out[0] == 0).all() and scale[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_outside_and_nan_inside_give_nan(kernel, dtype):
    args = case(8, "paper", 64, dtype, 1, (5, 9, 3), tokens=9)
    args[7], args[8] = torch.tensor([3, 0, -1, 1]), torch.tensor([2, 10, 1, 9])
    args[0] = args[0][:1].expand(4, -1, -1).contiguous()
    out = attend(kernel, args)
    assert out[:3].isnan().all() and not out[3].isnan().any()
    for scales in (2, 4):
        changed = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
        changed[scales][1, 4] = float("nan")
        assert attend(kernel, changed)[3].isnan().all()
    changed = list(args)
    changed[5], changed[6] = args[5][:8].contiguous(), args[6][:8].contiguous()
    assert attend(kernel, changed)[3].isnan().all()  # a token past the RoPE tables
    pools, table = paged(args[1:5], seed=0)
    table[1, 0] = 77
    assert attend(kernel, [args[0], *pools, *args[5:]], table=table)[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_strides_of_the_queries_change_no_bit(kernel, dtype, mode, bits):
    args = case(bits, mode, 64, dtype, 3, (20, 3))
    (q,) = views(2, (3 * KV_HEADS,), 64, dtype)
    transposed = torch.empty(3 * KV_HEADS, 2, 64, dtype=dtype).transpose(0, 1).copy_(q)
    want = attend(kernel, [q.contiguous(), *args[1:]])
    for x in (q, transposed):
        assert not x.is_contiguous()
        assert torch.equal(attend(kernel, [x, *args[1:]]), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_largest_length_of_zero(kernel, dtype):
    """No split has a token; the tickets are cleared all the same."""
    args = case(8, "paper", 64, dtype, 2, (0, 0), tokens=4)
    out, codes, scale = attend(kernel, args, 8, max_length=0)
    assert (out == 0).all() and (codes == 0).all() and (scale == 1).all()


def test_empty_batch(kernel):
    args = case(8, "paper", 64, torch.float16, 1, (5,))
    none = [args[0][:0], *args[1:7], args[7][:0], args[8][:0], *args[9:]]
    assert attend(kernel, none).shape == (0, KV_HEADS, 64)
