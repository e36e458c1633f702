"""Attention over a quantized KV cache.

Math:     spec 9. s_t = scaling * k_scale_t * (q . k_t),
          y = sum_t (e^s_t v_scale_t) v_t / sum_t e^s_t.
Shapes:   q [n, H, D], cache [S, Hkv, T, D or D / 2], slots, lengths [n] -> y [n, H, D].
Dtypes:   q, y fp32, fp16, bf16; cache int8, packed uint8, fp32, fp16, bf16; sums in fp32.
Tiling:   a program reads SPLIT tokens of one cached head for one query, in blocks, for up to 16
          query heads of the group: the M of an MMA, so that a GQA group reads the cache once.
          K is two tiles of half heads: RoPE pairs stay in a lane. A second kernel adds the splits.
          SPLIT is a constant, so bits depend neither on the batch nor on the cache's size.
Cost:     one read of codes and scales; 2 * 4 bytes * D a query head and split for the partial
          sums (3 % of the int8 cache at 4 heads a group); paper: and the tables, from L2. Scratch
          memory: up to MAX_SUMS, by the size of the cache; more queries are several launches.
Numerics: 2x rule. Codes are exact in every dtype of q; scales are applied in fp32 outside the
          products. In paper mode K is rotated in fp32 and rounded once. fp32 products are IEEE.
Edges:    tokens past the length are never loaded. Length 0 gives 0; NaN within the length gives
          NaN, and so does a slot or a length outside the cache (the host reads neither).
Limits:   groups of more than 16 query heads read the cache once for every 16. No fp32 queries over
          packed codes in paper mode with odd halves of more than 64 columns.
Tests:    tests/triton/test_attention_decode.py, tests/kernels/test_attention_decode_spec.py
Bench:    python -m benchmarks.run --op attention_decode --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InvalidArgument
from . import numerics
from .kv_cache import cache_form, check_index, check_table, heads_of
from .launch import ALIGNMENT, TRITON_TYPES, Variant, aligned, empty, launch, unaligned
from .row_tiles import next_power_of_two

SPLIT = 256
"""Tokens a program. 2048 tokens of 8 heads fill 64 multiprocessors with one sequence; half as many
would double the partial sums."""
GROUP = 16
"""Query heads a program: the smallest M of an MMA."""
SPLITS_AT_ONCE = 16
"""Partial sums that the second kernel loads at once."""
MAX_SUMS = 2**28
"""Bytes of partial sums. More queries are taken in parts: a prefill of 256 over a cache of 128k
tokens and 32 heads would need 2 GiB, for the host does not know how long the sequences are."""


def block_tokens(dtype: torch.dtype, half: int, per_token: bool, regular: bool) -> int:
    """Tokens at once: as many as the registers hold; fewer of heads of more than 128 columns, and
    of rows that begin anywhere (not ``regular``) and are loaded element by element.

    128 tokens take 15 % fewer instructions a token than 64, but paper mode also holds the tables
    and the rotated keys, halves that fill no power of two also hold masks, casts to fp16 hold
    both forms, and fp32 products run on the FMA units with operands in registers.
    """
    fits = dtype == torch.bfloat16 and not per_token and half == half_block(half)
    tokens = 32 if dtype == torch.float32 else 128 if fits and regular else 64
    if half_block(half) > 64:
        tokens //= 4 if per_token else 2
    return max(16, tokens if regular else tokens // 4)


def stages(dtype: torch.dtype, half: int, quantized: bool, regular: bool) -> int:
    """Steps whose loads are under way: one, where fp32 takes all registers, because single elements
    are loaded or a head has more than 128 columns."""
    if dtype != torch.float32:
        return 2
    return 1 if not regular or (half_block(half) > 64 and not quantized) else 2


def warps(dtype: torch.dtype, half: int) -> int:
    """Warps a program: one MMA row of 16 queries has work for 4, the sums of more than 128 columns
    for twice as many."""
    return 8 if dtype == torch.float32 or half_block(half) > 64 else 4


def fits(dtype: torch.dtype, half: int) -> bool:
    """Whether rotated fp32 keys of packed codes fit the registers: not those of wide halves whose
    two nibbles of a byte belong to different halves."""
    return dtype != torch.float32 or half % 2 == 0 or half_block(half) <= 64


@triton.jit
def _nibbles(byte):
    """The two codes of each packed byte (spec 8); shifts of signed words extend their sign."""
    word = byte.to(tl.int8, bitcast=True).to(tl.int32)
    return (word << 28) >> 28, word >> 4


@triton.jit
def _load_half(
    cache, row, inside, d, FIRST: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + HALF of the rows [TOKENS] of a cache: [TOKENS, HALF_BLOCK]."""
    if not PACKED:
        at = cache + row[:, None] * (2 * HALF) + (FIRST + d)[None, :]
        values = tl.load(at, mask=inside[:, None] & (d < HALF)[None, :], other=0)
    elif HALF % 2 == 0:
        j = tl.arange(0, HALF_BLOCK // 2)
        at = cache + row[:, None] * HALF + (FIRST // 2 + j)[None, :]
        byte = tl.load(at, mask=inside[:, None] & (j < HALF // 2)[None, :], other=0)
        low, high = _nibbles(byte)
        values = tl.reshape(tl.join(low, high), (row.shape[0], HALF_BLOCK))
    else:
        # A byte that holds columns of both halves is loaded with each.
        column = FIRST + d
        at = cache + row[:, None] * HALF + (column // 2)[None, :]
        byte = tl.load(at, mask=inside[:, None] & (d < HALF)[None, :], other=0)
        low, high = _nibbles(byte)
        values = tl.where((column % 2 == 0)[None, :], low, high)
    return values


@triton.jit(
    do_not_specialize=[
        "k_scale", "v_scale", "slots", "lengths", "n_slots", "tokens", "heads", "kv_heads",
        "splits", "table_rows", "scaling",
    ]
)  # fmt: skip
def attend_split_kernel(
    q, k_codes, k_scale, v_codes, v_scale, cos, sin, slots, lengths, sums, tops, weights,
    n_slots, tokens, heads, kv_heads, splits, table_rows, q_token, q_head, scaling,
    QUANTIZED: tl.constexpr, PACKED: tl.constexpr, PER_TOKEN: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums, largest score and weight of one split: [n, H, splits, D], [n, H, splits] twice."""
    query = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    split = tl.program_id(2)
    slot = tl.load(slots + query)
    length = tl.load(lengths + query)
    if (slot < 0) | (slot >= n_slots) | (length > tokens):
        return
    start = split * SPLIT
    if start >= length:
        return
    head_row = (slot * kv_heads + kv_head) * tokens
    scale_row = slot * tokens if PER_TOKEN else head_row
    end = tl.minimum(length, start + SPLIT).to(tl.int32)
    if QUANTIZED:
        # Relative to the split's largest scale, p * v_scale keeps its precision in the dtype of
        # q: nothing underflows in fp16, and a token that dominates is not rounded.
        every = start + tl.arange(0, SPLIT)
        steps = tl.load(v_scale + scale_row + every, mask=every < end, other=0.0)
        largest = tl.max(steps, axis=0)
        inverse = tl.where(largest > 0, tl.div_rn(1.0, largest), 0.0)
    repeats = heads // kv_heads
    member = (tl.program_id(1) // kv_heads) * GROUP + tl.arange(0, GROUP)
    head = kv_head * repeats + member
    d = tl.arange(0, HALF_BLOCK)
    q_mask = (member < repeats)[:, None] & (d < HALF)[None, :]
    at = q + query * q_token + head.to(tl.int64)[:, None] * q_head + d[None, :]
    q1 = tl.load(at, mask=q_mask, other=0.0)
    q2 = tl.load(at + HALF, mask=q_mask, other=0.0)
    dtype: tl.constexpr = q.dtype.element_ty

    top = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    sum1 = tl.zeros((GROUP, HALF_BLOCK), tl.float32)
    sum2 = tl.zeros((GROUP, HALF_BLOCK), tl.float32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < end
        row = head_row + token
        k1 = _load_half(k_codes, row, inside, d, 0, HALF, PACKED, HALF_BLOCK)
        k2 = _load_half(k_codes, row, inside, d, HALF, HALF, PACKED, HALF_BLOCK)
        if PER_TOKEN:
            table_mask = (inside & (token < table_rows))[:, None] & (d < HALF)[None, :]
            table = token[:, None] * HALF + d[None, :]
            c = tl.load(cos + table, mask=table_mask, other=0.0).to(tl.float32)
            s = tl.load(sin + table, mask=table_mask, other=0.0).to(tl.float32)
            x1, x2 = k1.to(tl.float32), k2.to(tl.float32)
            k1, k2 = x1 * c - x2 * s, x2 * c + x1 * s
        scores = tl.dot(q1, tl.trans(k1.to(dtype)), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2.to(dtype)), scores, input_precision="ieee")
        scores = scores * scaling
        if QUANTIZED:
            scores = scores * tl.load(k_scale + scale_row + token, mask=inside, other=0.0)[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        # tl.max drops NaN; a NaN score makes its weight, and so the result, NaN below.
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = numerics.exp(scores - shift[:, None])
        keep = numerics.exp(top - shift)
        weight = weight * keep + tl.sum(p, axis=1)
        sum1, sum2 = sum1 * keep[:, None], sum2 * keep[:, None]
        v1 = _load_half(v_codes, row, inside, d, 0, HALF, PACKED, HALF_BLOCK).to(dtype)
        v2 = _load_half(v_codes, row, inside, d, HALF, HALF, PACKED, HALF_BLOCK).to(dtype)
        if QUANTIZED:
            step = tl.load(v_scale + scale_row + token, mask=inside, other=0.0)
            p = p * (step * inverse)[None, :]
        p = p.to(dtype)
        sum1 = tl.dot(p, v1, sum1, input_precision="ieee")
        sum2 = tl.dot(p, v2, sum2, input_precision="ieee")
        top = new_top
    if QUANTIZED:
        sum1, sum2 = sum1 * largest, sum2 * largest

    part = (query * heads + head) * splits + split
    tl.store(tops + part, top, mask=member < repeats)
    tl.store(weights + part, weight, mask=member < repeats)
    at = sums + part[:, None] * (2 * HALF) + d[None, :]
    tl.store(at, sum1, mask=q_mask)
    tl.store(at + HALF, sum2, mask=q_mask)


@triton.jit(
    do_not_specialize=["slots", "lengths", "n_slots", "tokens", "heads", "splits"]
)  # fmt: skip
def add_splits_kernel(
    sums, tops, weights, slots, lengths, y, n_slots, tokens, heads, splits,
    D: tl.constexpr, D_BLOCK: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One head of one query: y = sum_i e^(top_i - top) sum_i / sum_i e^(top_i - top) weight_i."""
    query = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + query)
    length = tl.load(lengths + query)
    valid = (slot >= 0) & (slot < n_slots) & (length >= 0) & (length <= tokens)
    parts = tl.where(valid, (length + SPLIT - 1) // SPLIT, 0).to(tl.int32)
    row = query * heads + tl.program_id(1)
    first_part = row * splits
    d = tl.arange(0, D_BLOCK)
    i = tl.arange(0, PARTS)

    largest = tl.full((PARTS,), float("-inf"), tl.float32)
    for first in range(0, parts, PARTS):
        some = tl.load(tops + first_part + first + i, mask=first + i < parts, other=float("-inf"))
        largest = tl.maximum(largest, some)
    top = tl.max(largest, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)

    weight = tl.zeros((PARTS,), tl.float32)
    total = tl.zeros((PARTS, D_BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        inside = first + i < parts
        part = first_part + first + i
        keep = numerics.exp(tl.load(tops + part, mask=inside, other=float("-inf")) - shift)
        weight += keep * tl.load(weights + part, mask=inside, other=0.0)
        at = sums + part[:, None] * D + d[None, :]
        mask = inside[:, None] & (d < D)[None, :]
        total += keep[:, None] * tl.load(at, mask=mask, other=0.0)
    denominator = tl.where(parts == 0, 1.0, tl.sum(weight, axis=0))
    result = tl.div_rn(tl.sum(total, axis=0), tl.zeros((D_BLOCK,), tl.float32) + denominator)
    result = tl.where(valid, result, float("nan"))
    tl.store(y + row * D + d, result.to(y.dtype.element_ty), mask=d < D)


def attention_decode(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    lengths: Tensor,
    scaling: float,
    bits: int,
    pre_rope: bool,
) -> Tensor:
    """See spec 9."""
    n, heads, head_dim = q.shape
    form = cache_form(k_codes, k_scale, v_codes, v_scale, head_dim, bits, pre_rope)
    if form.heads == 0 or heads % form.heads:
        raise InvalidArgument(
            f"q: {heads} heads are not a multiple of the cache's {form.heads} KV heads"
        )
    if form.per_token:
        check_table(cos, sin, form.half)
    check_index("slots", slots, n)
    check_index("lengths", lengths, n)
    y = empty((n, heads, head_dim), q.dtype, q.device)
    if y.numel() == 0:
        return y
    if form.packed and form.per_token and not fits(q.dtype, form.half):
        raise InvalidArgument(
            f"q: float32 over packed codes in paper mode with head_dim {head_dim} is not supported"
            " by the triton backend; use bfloat16 or float16"
        )
    (q, regular), slots, lengths = heads_of(q), slots.contiguous(), lengths.contiguous()
    # Only a cache that was cut out of another tensor may have to be copied.
    k_codes, v_codes = aligned(k_codes), aligned(v_codes)
    splits = max(1, triton.cdiv(form.tokens, SPLIT))
    step = min(n, queries_at_once(heads, splits, head_dim))
    sums = empty((step, heads, splits, head_dim), torch.float32, q.device)
    tops = empty((step, heads, splits), torch.float32, q.device)
    weights = empty((step, heads, splits), torch.float32, q.device)
    groups = triton.cdiv(heads // form.heads, GROUP)
    cos, sin = aligned(cos), aligned(sin)
    for first in range(0, n, step):
        part = slice(first, first + step)
        count = min(step, n - first)
        launch(
            attend_split_kernel, (count, form.heads * groups, splits),
            q[part], k_codes, k_scale, v_codes, v_scale, cos, sin,
            slots[part], lengths[part], sums, tops, weights,
            form.slots, form.tokens, heads, form.heads, splits, cos.shape[0],
            q.stride(0), q.stride(1), scaling,
            QUANTIZED=form.quantized, PACKED=form.packed, PER_TOKEN=form.per_token,
            HALF=form.half, HALF_BLOCK=half_block(form.half), GROUP=GROUP,
            BLOCK=block_tokens(q.dtype, form.half, form.per_token, regular), SPLIT=SPLIT,
            num_warps=warps(q.dtype, form.half),
            num_stages=stages(q.dtype, form.half, form.quantized, regular), regular=regular,
        )  # fmt: skip
        launch(
            add_splits_kernel, (count, heads),
            sums, tops, weights, slots[part], lengths[part], y[part],
            form.slots, form.tokens, heads, splits,
            D=head_dim, D_BLOCK=2 * half_block(form.half), PARTS=SPLITS_AT_ONCE, SPLIT=SPLIT,
            num_warps=4,
        )  # fmt: skip
    return y


def queries_at_once(heads: int, splits: int, head_dim: int) -> int:
    """Queries whose sums over splits fit MAX_SUMS; an even number, so that each part of ``slots``
    begins at a multiple of 16 bytes.
    """
    return max(2, MAX_SUMS // (4 * heads * splits * head_dim) // 2 * 2)


def half_block(half: int) -> int:
    """Columns of a tile of half heads: at least 32, for heads of 64; an MMA takes 16."""
    return max(32, next_power_of_two(half))


KERNELS: dict[str, Any] = {"attention_decode": attention_decode}

HEAD_DIMS = (64, 80, 128, 256, 160, 66, 130, 72, 136)
"""Of real models, and one for each width of tile and kind of half: a power of two, even, odd; rows
at multiples of 16 bytes and rows that begin anywhere."""
ONLY_PACKED = (72, 136)
"""Whether a half is even matters where two codes share a byte."""
INDEX = {"slots": "*i64", "lengths": "*i64"}
PARTIAL = dict.fromkeys(("sums", "tops", "weights"), "*fp32")
SIZES = dict.fromkeys(
    ("n_slots", "tokens", "heads", "kv_heads", "splits", "table_rows", "q_token", "q_head"), "i32"
)


def _attend_variant(
    head_dim: int, dtype: torch.dtype, mode: str, codes: str, regular: bool
) -> Variant:
    name, store, half = TRITON_TYPES[dtype], f"*{codes}", head_dim // 2
    block = block_tokens(dtype, half, mode == "paper", regular)
    # Half a head of narrow codes in a small block has less than 16 bytes a lane.
    row_bytes = {"u8": half // 2, "i8": half}.get(codes, half * dtype.itemsize)
    wide = block * row_bytes >= 16 * 32 * warps(dtype, half)
    variant = Variant(
        f"attention_decode {mode} {name} over {codes} D={head_dim}",
        attend_split_kernel,
        {"q": f"*{name}", "k_codes": store, "k_scale": "*fp32", "v_codes": store,
         "v_scale": "*fp32", "cos": "*fp32", "sin": "*fp32", **INDEX, **PARTIAL,
         **SIZES, "scaling": "fp32"},
        {"QUANTIZED": mode != "off", "PACKED": codes == "u8", "PER_TOKEN": mode == "paper",
         "HALF": half, "HALF_BLOCK": half_block(half), "GROUP": GROUP, "BLOCK": block,
         "SPLIT": SPLIT},
        num_warps=warps(dtype, half), num_stages=stages(dtype, half, mode != "off", regular),
        promises=frozenset({"vector_loads"} if wide else ()),
    )  # fmt: skip
    return variant if regular else unaligned(variant)


def variants(arch: int) -> Iterator[Variant]:
    """Every mode and dtype at every head dimension that it takes."""
    for head_dim in HEAD_DIMS:
        half = head_dim // 2
        regular = head_dim % ALIGNMENT == 0
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = TRITON_TYPES[dtype]
            for mode, codes in (
                ("paper", "i8"), ("paper", "u8"), ("serving", "i8"), ("serving", "u8"),
                ("off", name),
            ):  # fmt: skip
                if head_dim in ONLY_PACKED and codes != "u8":
                    continue
                if (mode, codes) == ("paper", "u8") and not fits(dtype, half):
                    continue
                yield _attend_variant(head_dim, dtype, mode, codes, regular)
            if head_dim in ONLY_PACKED:
                continue
            yield Variant(
                f"attention_decode add splits {name} D={head_dim}",
                add_splits_kernel,
                {**PARTIAL, **INDEX, "y": f"*{name}", "n_slots": "i32", "tokens": "i32",
                 "heads": "i32", "splits": "i32"},
                {"D": head_dim, "D_BLOCK": 2 * half_block(half),
                 "PARTS": SPLITS_AT_ONCE, "SPLIT": SPLIT},
                num_warps=4, promises=frozenset({"vector_loads"} if regular else ()),
            )  # fmt: skip
