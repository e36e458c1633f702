"""The plain statement of the two KV modes of spec 9 that caches and attention are held against.

`paper` quantizes the row of all KV heads of a token before RoPE; `serving` quantizes each head of a
token after RoPE.
"""

from __future__ import annotations

from torch import Tensor

import llmqat_kernels as qk


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
