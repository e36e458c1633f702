"""Attention over a quantized KV cache, for decoding and prefill alike: spec 9."""

from __future__ import annotations

import torch
from torch import Tensor

from .int4 import unpack_int4
from .quantize import QUANTIZED_BITS, dequantize
from .rope import rotate


def cached_rows(
    codes: Tensor,
    scale: Tensor,
    slot: int,
    length: int,
    head_dim: int,
    bits: int,
    pre_rope: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens 0..length-1 of one slot, dequantized to ``dtype``: [Hkv, length, D] (spec 9)."""
    rows = codes[slot, :, :length]
    if bits not in QUANTIZED_BITS:
        return rows.to(dtype)
    if rows.dtype == torch.uint8:
        rows = unpack_int4(rows, head_dim)
    # The paper's mode has one scale per token, shared by the heads.
    scales = (
        scale[slot, :length].expand(rows.shape[0], length) if pre_rope else scale[slot, :, :length]
    )
    return dequantize(rows, scales, -1, dtype)


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
    """Query i of q [n, H, D] over tokens 0..lengths[i]-1 of slot slots[i] -> [n, H, D] (spec 9).

    Head h reads KV head ``h // (H / Hkv)``. Scores, softmax and sums are fp32; the result has q's
    dtype. A length of 0 gives 0. Several queries may share a slot: with lengths 1, 2, 3, ... this
    is causal prefill.
    """
    out = torch.zeros_like(q)
    heads, head_dim = q.shape[1:]
    repeats = heads // k_codes.shape[1]
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if length == 0:
            continue
        key = cached_rows(k_codes, k_scale, slot, length, head_dim, bits, pre_rope, q.dtype)
        value = cached_rows(v_codes, v_scale, slot, length, head_dim, bits, pre_rope, q.dtype)
        if pre_rope and bits in QUANTIZED_BITS:
            key = rotate(key, cos[:length], sin[:length])
        key = key.to(torch.float32).repeat_interleave(repeats, dim=0)
        value = value.to(torch.float32).repeat_interleave(repeats, dim=0)
        scores = (key @ q[i].to(torch.float32).unsqueeze(-1)).squeeze(-1) * scaling
        weights = torch.softmax(scores, dim=-1)
        out[i] = (weights.unsqueeze(-2) @ value).squeeze(-2).to(q.dtype)
    return out
