"""Keys and values of one token in the two modes of spec 9, and caches that fit a model.

`paper` quantizes the row of all KV heads of a token before RoPE; `serving` quantizes each head of a
token after RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor

import llmqat_kernels as qk
from llmqat.config import PACKED_KV_BITS, QATConfig
from llmqat.errors import ConfigError


def quantize_kv(x: Tensor, bits: int, mode: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of K or V of one layer, as a cache holds them.

    Args:
        x: float [B, Hkv, T, D]; K is taken before RoPE in `paper` mode, after it in `serving` mode.
        bits: 2..8. mode: `paper` or `serving`.

    Returns:
        codes int8 [B, Hkv, T, D]; scale fp32 [B, T] (paper) or [B, Hkv, T] (serving).
    """
    if mode == "serving":
        return qk.quantize(x, bits)
    b, h, t, d = x.shape
    codes, scale = qk.quantize(x.transpose(1, 2).reshape(b, t, h * d), bits)
    return codes.view(b, t, h, d).transpose(1, 2), scale


def allocate_caches(
    config: object,
    quantization: QATConfig,
    slots: int,
    max_len: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[qk.KVCache]:
    """One empty cache per block of a transformers config; `dtype` only matters to 16 bits.

    Raises:
        ConfigError: a KV width that no cache holds.
    """
    if quantization.kv_bits not in PACKED_KV_BITS:
        raise ConfigError(
            f"kv_bits: {quantization.kv_bits} has no packed KV cache; use 4, 8, 16 or 32"
        )
    heads, head_dim = config.num_key_value_heads, config.head_dim  # type: ignore[attr-defined]
    bits = min(quantization.kv_bits, 16)
    return [
        qk.KVCache.allocate(
            slots,
            heads,
            max_len,
            head_dim,
            bits=bits,
            mode=quantization.kv_mode,
            device=device,
            dtype=dtype,
        )
        for _ in range(config.num_hidden_layers)  # type: ignore[attr-defined]
    ]
