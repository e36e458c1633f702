"""Token sampling with counter-based noise.

Math:     spec 15, 16. token = argmax_v (logit_v / temperature + gumbel_v), or argmax_v logit_v.
Shapes:   logits [n, V], record, step, greedy [n] -> tokens int64 [n].
Dtypes:   logits fp32, fp16, bf16; scores in fp32.
Tiling:   SPAN tokens of one row a program, so that one row of 128,256 logits fills 32 programs; a
          second kernel takes the best of each row's spans. The maximum that prefers the first index
          is associative: any split gives the same token. The four words of a Philox call stay
          in one lane. top_k: before it, one program a row finds the k-th largest logit by its
          bits, 8 at a time (five passes, from L2).
Cost:     one read of the logits; 10 Philox rounds for 4 tokens and 2 logarithms for each, some
          70 instructions a token: compute bound, 2 bytes a token of bf16.
Numerics: exact. Products of Philox are 64-bit integers.
Edges:    V not a multiple of a block is masked; NaN or nothing finite gives -1.
Limits:   V < 2^31. top_k runs on one multiprocessor a row.
Tests:    tests/triton/test_sample.py, tests/kernels/test_sample_spec.py
Bench:    python -m benchmarks.run --op sample --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import sampling as spec_sampling
from . import numerics
from .launch import TRITON_TYPES, Variant, empty, launch, rows_near, unaligned
from .row_tiles import next_power_of_two

MULTIPLIER_0 = tl.constexpr(spec_sampling.PHILOX_MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(spec_sampling.PHILOX_MULTIPLIERS[1])
WEYL_0 = tl.constexpr(spec_sampling.PHILOX_WEYL[0])
WEYL_1 = tl.constexpr(spec_sampling.PHILOX_WEYL[1])
ROUNDS = tl.constexpr(spec_sampling.PHILOX_ROUNDS)
MASK32 = tl.constexpr(spec_sampling.MASK32)
NO_INDEX = tl.constexpr(2**31 - 1)

SPAN = 4096
"""Tokens a program. Partial results are 12 bytes for each of its 8 KiB of bf16 logits."""
BLOCK = 1024
"""Tokens at once: 8 a lane at 4 warps, two Philox calls."""
SELECT_BLOCK = 2048
"""Tokens at once of the top-k search: 8 a lane at 8 warps."""


@triton.jit
def _philox(index, step, record, key0, key1):
    """The four words of spec 15 as 64-bit integers; every argument holds 32-bit words so."""
    c0 = index
    c1 = tl.zeros_like(index) + (step & MASK32)
    c2 = tl.zeros_like(index) + (record & MASK32)
    c3 = tl.zeros_like(index) + ((record >> 32) & MASK32)
    for _ in tl.static_range(ROUNDS):
        product0, product1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c2 = (product1 >> 32) ^ c1 ^ key0, (product0 >> 32) ^ c3 ^ key1
        c1, c3 = product1 & MASK32, product0 & MASK32
        key0, key1 = (key0 + WEYL_0) & MASK32, (key1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


@triton.jit
def _gumbel(first, step, record, key0, key1, BLOCK: tl.constexpr):
    """Noise of the tokens first .. first + BLOCK; first is a multiple of 4 (spec 15, 16)."""
    quad = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint64)
    w0, w1, w2, w3 = _philox(quad, step, record, key0, key1)
    # [quad, i, j] is word 2 i + j.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    u = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -numerics.log(-numerics.log(u))


@triton.jit
def _ordered(x):
    """int32 that order like fp32 x; -0 and 0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["k"])
def select_kernel(
    logits, keys, lasts, vocabulary, row_stride, k, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row: the ordered bits of its k-th largest logit, and the last index among the equal
    ones that is still one of the k largest.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.uint32)
    wanted = k  # how many to take from the keys that share the prefix
    for digit_place in range(4):
        shift = 24 - 8 * digit_place
        counts = tl.zeros((256,), tl.int32)
        for first in range(0, vocabulary, BLOCK):
            v = first + lane
            x = tl.load(logits + row * row_stride + v, mask=v < vocabulary, other=0.0)
            key = _ordered(x.to(tl.float32)).to(tl.uint32, bitcast=True) ^ 0x80000000
            same = (v < vocabulary) & ((((key ^ prefix) >> shift) >> 8) == 0)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=same)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # with a larger digit
        digit = tl.max(tl.where(above + counts >= wanted, digits, 0), axis=0)
        wanted -= tl.sum(tl.where(digits == digit, above, 0), axis=0)
        prefix |= digit.to(tl.uint32) << shift
    key_k = (prefix ^ 0x80000000).to(tl.int32, bitcast=True)

    last = tl.full((), 0, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        v = first + lane
        x = tl.load(logits + row * row_stride + v, mask=v < vocabulary, other=0.0)
        equal = (_ordered(x.to(tl.float32)) == key_k) & (v < vocabulary)
        rank = tl.cumsum(equal.to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(equal & (rank <= wanted), v, 0), axis=0))
        wanted -= tl.sum(equal.to(tl.int32), axis=0)
    tl.store(keys + row, key_k)
    tl.store(lasts + row, last)


@triton.jit(
    do_not_specialize=["record", "step", "greedy", "spans", "key0", "key1", "temperature"]
)  # fmt: skip
def sample_span_kernel(
    logits, record, step, greedy, keys, lasts, scores, tokens, states,
    vocabulary, row_stride, spans, key0, key1, temperature,
    DIVIDE: tl.constexpr, TOP_K: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best token of one span of one row; state: 1 = NaN seen, 2 = a finite logit seen."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1)
    draw = tl.load(greedy + row) == 0
    own_record = tl.load(record + row).to(tl.uint64)
    own_step = tl.load(step + row).to(tl.uint64)
    low, high = key0.to(tl.uint64) & MASK32, key1.to(tl.uint64) & MASK32
    if TOP_K:
        key_k = tl.load(keys + row)
        last = tl.load(lasts + row)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), NO_INDEX, tl.int32)
    state = tl.zeros((BLOCK,), tl.int32)
    end = tl.minimum(vocabulary, (span + 1) * SPAN)
    for first in range(span * SPAN, end, BLOCK):
        v = first + lane
        x = tl.load(logits + row * row_stride + v, mask=v < end, other=float("-inf"))
        x = x.to(tl.float32)
        state |= tl.where(x != x, 1, 0)
        state |= tl.where(numerics.magnitude_bits(x) < numerics.INFINITY_BITS, 2, 0)
        score = x
        if draw:
            if DIVIDE:
                score = tl.div_rn(x, tl.zeros_like(x) + temperature)
            score += _gumbel(first, own_step, own_record, low, high, BLOCK)
            if TOP_K:
                key = _ordered(x)
                taken = (key > key_k) | ((key == key_k) & (v <= last))
                score = tl.where(taken, score, float("-inf"))
        # Later tokens win only if they are larger; the first of all has index NO_INDEX.
        better = (score > best) | (where == NO_INDEX)
        best = tl.where(better, score, best)
        where = tl.where(better & (v < end), v, where)
    at = row * spans + span
    top = tl.max(best, axis=0)
    tl.store(scores + at, top)
    tl.store(tokens + at, tl.min(tl.where(best == top, where, NO_INDEX), axis=0))
    seen = tl.max(state & 1, axis=0) + tl.max(state & 2, axis=0)
    tl.store(states + at, seen)


@triton.jit(do_not_specialize=["spans"])
def best_span_kernel(scores, tokens, states, y, spans, SPANS: tl.constexpr):
    """The best token of each row, or -1."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    at = row * spans + span
    score = tl.load(scores + at, mask=span < spans, other=float("-inf"))
    token = tl.load(tokens + at, mask=span < spans, other=NO_INDEX)
    state = tl.load(states + at, mask=span < spans, other=0)
    top = tl.max(score, axis=0)
    first = tl.min(tl.where(score == top, token, NO_INDEX), axis=0)
    usable = (tl.max(state & 1, axis=0) == 0) & (tl.max(state & 2, axis=0) == 2)
    tl.store(y + row, tl.where(usable, first, -1).to(tl.int64))


def signed_word(word: int) -> int:
    """The low 32 bits of ``word`` as a signed number: one argument type for every seed."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def sample(
    logits: Tensor,
    record: Tensor,
    step: Tensor,
    greedy: Tensor,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """See spec 15, 16."""
    n, vocabulary = logits.shape
    device = logits.device
    y = empty((n,), torch.int64, device)
    if n == 0 or vocabulary == 0:
        return y.fill_(-1)
    logits = rows_near(logits)
    selects = 0 < top_k < vocabulary
    keys = empty((n if selects else 0,), torch.int32, device)
    lasts = empty((n if selects else 0,), torch.int32, device)
    if selects:
        launch(
            select_kernel, (n,), logits, keys, lasts, vocabulary, logits.stride(0), top_k,
            BLOCK=SELECT_BLOCK, num_warps=8,
        )  # fmt: skip
    spans = triton.cdiv(vocabulary, SPAN)
    scores = empty((n, spans), torch.float32, device)
    tokens = empty((n, spans), torch.int32, device)
    states = empty((n, spans), torch.int32, device)
    launch(
        sample_span_kernel, (n, spans),
        logits, record.contiguous(), step.contiguous(), greedy.contiguous(), keys, lasts,
        scores, tokens, states, vocabulary, logits.stride(0), spans,
        signed_word(seed), signed_word(seed >> 32), temperature,
        DIVIDE=temperature != 1.0, TOP_K=selects, SPAN=SPAN, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        best_span_kernel, (n,), scores, tokens, states, y, spans,
        SPANS=next_power_of_two(spans), num_warps=1,
    )  # fmt: skip
    return y


KERNELS: dict[str, Any] = {"sample": sample}

MOST_SPANS = 256
"""For ahead-of-time compilation: vocabularies of up to a million tokens."""


def variants(arch: int) -> Iterator[Variant]:
    """Every form."""
    partial = {"scores": "*fp32", "tokens": "*i32", "states": "*i32"}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = TRITON_TYPES[dtype]
        kth = {"keys": "*i32", "lasts": "*i32"}
        sizes = {"vocabulary": "i32", "row_stride": "i32"}
        select = Variant(
            f"sample select {name}", select_kernel,
            {"logits": f"*{name}", **kth, **sizes, "k": "i32"}, {"BLOCK": SELECT_BLOCK},
            num_warps=8, promises=frozenset({"vector_loads"}),
        )  # fmt: skip
        yield from (select, unaligned(select))
        for divide, top_k in ((False, False), (True, False), (False, True), (True, True)):
            span = Variant(
                f"sample {name}{' temperature' if divide else ''}{' top_k' if top_k else ''}",
                sample_span_kernel,
                {"logits": f"*{name}", "record": "*i64", "step": "*i64", "greedy": "*u1", **kth,
                 **partial, **sizes, "spans": "i32", "key0": "i32", "key1": "i32",
                 "temperature": "fp32"},
                {"DIVIDE": divide, "TOP_K": top_k, "SPAN": SPAN, "BLOCK": BLOCK},
                num_warps=4, promises=frozenset({"vector_loads"}),
            )  # fmt: skip
            yield from (span, unaligned(span))
    for doublings in range(MOST_SPANS.bit_length()):
        yield Variant(
            f"sample best of {1 << doublings} spans", best_span_kernel,
            {**partial, "y": "*i64", "spans": "i32"}, {"SPANS": 1 << doublings}, num_warps=1,
        )  # fmt: skip
