"""The KV cache in pages, and attention with the codes of its output: spec 9."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import attention, quantize, rope

PAGE_TOKENS = 64
"""Tokens of a page."""


def gather_pages(pool: Tensor, page_table: Tensor, pages: int | None = None) -> Tensor:
    """The first ``pages`` (default: all) pages of every slot as the contiguous cache that they
    stand for (spec 9).

    Args:
        pool: codes [P, Hkv, 64, D or D / 2] or scales [P, Hkv, 64] or [P, 64]; empty stays empty.
        page_table: int32 [S, pages]; entries that name no page give any page.

    Returns:
        [S, Hkv, pages * 64, ...] or [S, pages * 64].
    """
    if pool.numel() == 0:
        return pool
    table = page_table[:, :pages].to(torch.int64).clamp(0, pool.shape[0] - 1)
    picked = pool[table]
    if pool.dim() == 2:
        return picked.flatten(1, 2)
    return picked.transpose(1, 2).flatten(2, 3).contiguous()


def rope_quantize_append_paged(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
    rope_quantize_append: Callable[..., None] = rope.rope_quantize_append,
) -> None:
    """``rope_quantize_append`` into pages: token ``positions[i]`` of slot ``slots[i]`` lies in page
    ``page_table[slots[i], positions[i] // 64]`` (spec 9).
    """
    pools = (k_codes, k_scale, v_codes, v_scale)
    cache = [gather_pages(pool, page_table) for pool in pools]
    rope_quantize_append(k, v, cos, sin, *cache, slots, positions, bits, pre_rope)
    pages = page_table[slots, positions // PAGE_TOKENS].to(torch.int64)
    offsets = positions % PAGE_TOKENS
    for pool, filled in zip(pools, cache, strict=True):
        if pool.numel() == 0:
            continue
        if pool.dim() == 2:
            pool[pages, offsets] = filled[slots, positions]
        else:
            pool[pages, :, offsets] = filled[slots, :, positions]


def rope_quantize_append_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    page_table: Tensor | None,
    slots: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
    rope_quantize_append: Callable[..., None] = rope.rope_quantize_append,
    rope_quantize_append_paged: Callable[..., None] = rope_quantize_append_paged,
    rope: Callable[..., Tensor] = rope.rope,
) -> Tensor:
    """What comes between the projections and attention: k, v [n, Hkv, D] into the cache, and the
    rotated queries of q [n, H, D] (spec 9).
    """
    cache = (k_codes, k_scale, v_codes, v_scale)
    places = (slots, positions, bits, pre_rope)
    if page_table is None:
        rope_quantize_append(k, v, cos, sin, *cache, *places)
    else:
        rope_quantize_append_paged(k, v, cos, sin, *cache, page_table, *places)
    return rope(q, cos, sin, positions)


def attention_decode_paged(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    page_table: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    bits: int,
    pre_rope: bool,
    attention_decode: Callable[..., Tensor] = attention.attention_decode,
) -> Tensor:
    """``attention_decode`` over pages (spec 9). ``max_length`` is at least every length."""
    pages = -(-max_length // PAGE_TOKENS)
    pools = (k_codes, k_scale, v_codes, v_scale)
    cache = [gather_pages(pool, page_table, pages) for pool in pools]
    return attention_decode(q, *cache, cos, sin, slots, lengths, scaling, bits, pre_rope)


def attention_decode_quantize(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    page_table: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    bits: int,
    pre_rope: bool,
    a_bits: int,
    attention_decode: Callable[..., Tensor] = attention.attention_decode,
    attention_decode_paged: Callable[..., Tensor] = attention_decode_paged,
    quantize: Callable[..., tuple[Tensor, Tensor]] = quantize.quantize,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention and what the output projection reads of it: (out [n, H, D], codes int8 [n, H * D],
    scale [n]), the codes those of ``quantize`` of a query's row of all heads (spec 9, 1-4).
    """
    cache = (k_codes, k_scale, v_codes, v_scale)
    places = (cos, sin, slots, lengths)
    if page_table is None:
        out = attention_decode(q, *cache, *places, scaling, bits, pre_rope)
    else:
        out = attention_decode_paged(
            q, *cache, page_table, *places, max_length, scaling, bits, pre_rope
        )
    codes, scale = quantize(out.flatten(1), a_bits)
    return out, codes, scale
