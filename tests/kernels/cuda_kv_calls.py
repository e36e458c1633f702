"""Calls of the CUDA operators on the KV cache.

Sequences of more than one split of 256 tokens, heads such that 2, 4 and 8 warps share the tokens of
a split, and so many queries that these are together in a block: ``test_cuda_cases.py`` asks the
heuristics whether they do. What no sequence has
written is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from llmqat_kernels.spec import rope
from llmqat_kernels.testing import generator
from tests.emulator.kv import paged
from tests.kernels.cuda_calls import Case
from tests.kernels.kv_cases import MODES, empty_cache, fill, tables

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-4, FP16: 8e-3, BF16: 3e-2}
"""Of attention, by the dtype to which the reference rounds keys and values: at least twice what the
emulator shows."""
SHORT, LONG = (317, 5, 0), (600, 257, 0)
"""Tokens of the three sequences: two splits, three splits."""


@dataclass(frozen=True)
class Form:
    """A cache and the queries on it; ``cache_dtype`` of a float one (bits 16)."""

    head_dim: int
    bits: int
    mode: str
    kv_heads: int = 2
    group: int = 2
    dtype: torch.dtype = BF16
    cache_dtype: torch.dtype = FP32
    lengths: tuple[int, ...] = SHORT
    small: bool = True
    more: int = 0  # queries of a few tokens each

    @property
    def pre_rope(self) -> bool:
        """Whether the cache holds K before RoPE."""
        return self.mode == "paper" and self.bits != 16

    def cache(self) -> tuple[Tensor, ...]:
        """k_codes, k_scale, v_codes, v_scale with the sequences in them."""
        cache = empty_cache(
            len(self.lengths), self.kv_heads, max(self.lengths), self.head_dim, self.bits,
            self.mode, "nan", self.cache_dtype,
        )  # fmt: skip
        fill(
            rope.rope_quantize_append, cache, self.lengths, self.kv_heads, self.head_dim,
            self.bits, self.mode, self.dtype,
        )  # fmt: skip
        return cache

    def pages(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same in pages of random order, and their table: no page where no token lies."""
        pools, table = paged(self.cache(), seed=1)
        first = torch.arange(table.shape[1]) * 64
        used = first < torch.tensor(self.lengths)[:, None]
        return tuple(pools), torch.where(used, table, 2**30).to(torch.int32)

    def queries(self) -> tuple[Tensor, tuple[Any, ...]]:
        """q, and (cos, sin, slots, lengths): a query of every sequence, the last one first, then
        those of the first tokens of the first one."""
        slots = torch.arange(len(self.lengths)).flip(0)
        own = torch.tensor(self.lengths)[slots]
        slots = torch.cat((slots, torch.zeros(self.more, dtype=torch.int64)))
        size = len(slots), self.kv_heads * self.group, self.head_dim
        q = torch.randn(size, generator=generator(5)).to(self.dtype)  # not the numbers of `fill`
        places = slots, torch.cat((own, torch.arange(self.more) % 7 + 1))
        return q, (*tables(max(self.lengths), self.head_dim), *places)

    @property
    def rest(self) -> tuple[Any, ...]:
        """The arguments at the end."""
        return self.head_dim**-0.5, self.bits, self.pre_rope

    @property
    def limit(self) -> float:
        """Of the result's floats."""
        return LIMITS[self.dtype]


# KV heads and the query heads of each: 8, 4 and 2 warps for the tokens of a split; heads that do
# not fill the last block, with query heads of two fragments.
HEADS = ((2, 3), (4, 1), (16, 1), (5, 9))
LARGE_HEADS = ((8, 12), (16, 12), (18, 1), (3, 8))
INSTANCES = tuple(product((64, 128), (4, 8), MODES))
"""Of the tensor core kernel."""

MORE = (  # the last one: a block for each part of 5 heads
    Form(64, 8, "serving", 2, 1, BF16, more=75),
    Form(64, 4, "serving", 5, 9, FP16, more=27),
    Form(128, 8, "serving", 16, 1, FP16, more=38),
    Form(64, 4, "paper", 5, 9, BF16),
)
TENSOR = (
    *(
        Form(*instance, *HEADS[i % 4], (BF16, FP16)[i // 2 % 2])
        for i, instance in enumerate(INSTANCES)
    ),
    *MORE,
    *(
        Form(*instance, *LARGE_HEADS[i % 4], (FP16, BF16)[i // 4], lengths=LONG, small=False)
        for i, instance in enumerate(INSTANCES)
    ),
)
SCALAR = (
    Form(64, 8, "paper", dtype=FP32),
    Form(128, 4, "serving", 2, 1, FP32),
    Form(64, 16, "serving", dtype=BF16, cache_dtype=BF16),
    Form(80, 16, "serving", 1, 3, FP16, FP16),
    Form(6, 16, "serving", dtype=FP32, cache_dtype=FP32),
    Form(80, 4, "paper", 2, 3, BF16),
    Form(6, 8, "serving", dtype=FP16),
    Form(160, 8, "paper", 4, 2, FP32, lengths=LONG, small=False),
)
"""fp32 queries, float caches, other head dimensions."""
PAGED = (
    *(TENSOR[i] for i in (1, 2, 4, 7)),  # 4 and 2 warps for a split, then 8, then not full
    *MORE,
    *(SCALAR[i] for i in (0, 2, 5)),
    *(form for form in (*TENSOR, *SCALAR) if not form.small),
)


def attention_decode() -> Iterator[Case]:
    for form in (*TENSOR, *SCALAR):
        q, places = form.queries()
        yield Case((q, *form.cache(), *places, *form.rest), None, form.limit, form.small)


def attention_decode_paged() -> Iterator[Case]:
    for form in PAGED:
        q, places = form.queries()
        pools, table = form.pages()
        args = q, *pools, table, *places, max(form.lengths), *form.rest
        yield Case(args, None, form.limit, form.small)


def attention_decode_quantize() -> Iterator[Case]:
    for number, form in enumerate(PAGED):
        q, places = form.queries()
        held = (form.cache(), None) if number % 2 else form.pages()
        args = q, *held[0], held[1], *places, max(form.lengths), *form.rest, 4 + number % 3 * 2
        yield Case(args, None, form.limit, form.small)


def _appends() -> Iterator[tuple[Form, int]]:
    """Forms of caches (each of 130 tokens) and how many tokens are written."""
    for instance in INSTANCES:
        yield Form(*instance), 5
    for dtype, mode in product((FP32, FP16), MODES):
        yield Form(64, 8, mode, 3, dtype=dtype), 5
    for bits, mode in product((4, 8), MODES):
        yield Form(6, bits, mode, 3, dtype=FP32), 5
        yield Form(6, bits, mode, 3), 5
    yield Form(128, 8, "paper", 72), 2  # wider than what a block keeps in registers
    yield Form(128, 4, "paper", 72), 2
    for dtype, cache_dtype in ((BF16, BF16), (FP32, FP16), (FP16, FP32), (FP32, FP32)):
        yield Form(80, 16, "serving", dtype=dtype, cache_dtype=cache_dtype), 5


TOKENS = 130
PLACES = torch.tensor([2, 0, 1, 1, 2]), torch.tensor([129, 64, 63, 0, 77])


def _append(is_paged: bool) -> Iterator[Case]:
    for form, count in _appends():
        cache: tuple[Any, ...] = empty_cache(
            3, form.kv_heads, TOKENS, form.head_dim, form.bits, form.mode, "random",
            form.cache_dtype,
        )  # fmt: skip
        if is_paged:
            pools, table = paged(cache, seed=1)
            cache = (*pools, table)
        k, v = torch.randn(2, count, form.kv_heads, form.head_dim).to(form.dtype)
        k[0, 0, 1], v[1] = 40.0, 0.0
        index = tuple(places[:count] for places in PLACES)
        yield Case((k, v, *tables(TOKENS, form.head_dim), *cache, *index, form.bits, form.pre_rope))


GROUPS = (1, 4, 3)
"""Query heads of a KV head."""


def rope_quantize_append_queries() -> Iterator[Case]:
    """k, v and q as the engine has them: parts of one product."""
    for number, (contiguous, in_pages) in enumerate(
        zip(_append(False), _append(True), strict=True)
    ):
        k, v, cos, sin, *rest = (in_pages if number % 2 else contiguous).args
        table = rest[4] if number % 2 else None
        n, kv_heads, dim = k.shape
        heads = kv_heads * GROUPS[number % 3]
        base = torch.randn(n, heads + 2 * kv_heads, dim).to(k.dtype)
        q, own_k, own_v = base.split_with_sizes((heads, kv_heads, kv_heads), 1)
        own_k.copy_(k), own_v.copy_(v)
        places = rest[-4:]
        yield Case((q, own_k, own_v, cos, sin, *rest[:4], table, *places))


def rope_quantize_append() -> Iterator[Case]:
    return _append(False)


def rope_quantize_append_paged() -> Iterator[Case]:
    return _append(True)
