"""Rotary embedding and the write into the KV cache: spec 9."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .int4 import pack_int4
from .quantize import QUANTIZED_BITS, fake_quantize, quantize


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [..., D] by cos, sin [..., D / 2], in the dtype of x (spec 9)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    # In bf16 and fp16 torch computes each of these in fp32 and rounds it once, which is the spec.
    return torch.cat((x1 * cos + (-x2) * sin, x2 * cos + x1 * sin), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """RoPE of x [n, H, D] at ``positions`` [n] of the tables cos, sin [T, D / 2] (spec 9)."""
    return rotate(x, cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2))


def rope_fake_quantize(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
    ste_clip: float | None = None,
    rope: Callable[..., Tensor] = rope,
    fake_quantize: Callable[..., Tensor] = fake_quantize,
) -> tuple[Tensor, Tensor]:
    """What attention reads of k, v [n, Hkv, D] once they went through the cache: rotated,
    fake-quantized keys and fake-quantized values, [n, Hkv, D] each (spec 9; the training form).

    Width 16 or 32 only rotates. ``ste_clip`` only matters to the gradient.
    """
    if bits not in QUANTIZED_BITS:
        return rope(k, cos, sin, positions), v.clone()

    def through_cache(x: Tensor) -> Tensor:
        rows = x.flatten(1) if pre_rope else x
        return fake_quantize(rows, bits).reshape(x.shape)

    if pre_rope:
        return rope(through_cache(k), cos, sin, positions), through_cache(v)
    return through_cache(rope(k, cos, sin, positions)), through_cache(v)


def rope_quantize_append(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    slots: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
) -> None:
    """Write k, v [n, Hkv, D] into rows (slots[i], positions[i]) of the cache, in place (spec 9).

    ``pre_rope`` is the paper's mode: K before RoPE, one scale per token. Otherwise (serving) K is
    rotated first and every head has its scale. Width 16 or 32 stores rotated K and V as floats.
    The places of one call are distinct.
    """
    if bits not in QUANTIZED_BITS:
        keys = rope(k, cos, sin, positions).to(k_codes.dtype)
        values = v.to(v_codes.dtype)
        for i in range(k.shape[0]):
            k_codes[slots[i], :, positions[i]] = keys[i]
            v_codes[slots[i], :, positions[i]] = values[i]
        return
    if not pre_rope:
        k = rope(k, cos, sin, positions)
    for x, codes_cache, scale_cache in ((k, k_codes, k_scale), (v, v_codes, v_scale)):
        rows = x.flatten(1) if pre_rope else x
        codes, scale = quantize(rows, bits)
        codes = codes.reshape(x.shape)
        if codes_cache.dtype == torch.uint8:
            codes = pack_int4(codes)
        for i in range(x.shape[0]):
            codes_cache[slots[i], :, positions[i]] = codes[i]
            if pre_rope:
                scale_cache[slots[i], positions[i]] = scale[i]
            else:
                scale_cache[slots[i], :, positions[i]] = scale[i]
