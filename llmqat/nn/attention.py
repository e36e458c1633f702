"""Quantized keys and values inside transformers' own attention modules.

`serving` mode is an attention function that transformers calls with K after RoPE and V: it
fake-quantizes both per token and head and hands on to the library's sdpa attention. A transformers
cache keeps the unquantized tensors, and each forward quantizes what it reads: quantization is a
pure function of a token's row, so a key has the same codes in every step and the cached forward
equals the full one. `paper` mode needs no attention function: it is the output quantizer of k_proj
and v_proj (`LinearSpec.output`), applied before RoPE and before any cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.models import compat

ATTENTION_NAME = "llmqat_sdpa"
MODULE_ATTRIBUTE = "llmqat_kv"


@dataclass(frozen=True)
class KVQuantizer:
    """Fake quantization of K and V [B, Hkv, T, D], one scale per token and head (spec 9,
    `serving`).
    """

    bits: int
    ste_clip: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return qk.fake_quantize(x, self.bits, ste_clip=self.ste_clip)


def quantized_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function protocol: query [B, H, Q, D], key and value [B, Hkv, T, D]
    -> [B, Q, H, D].
    """
    quantizer = getattr(module, MODULE_ATTRIBUTE, None)
    if quantizer is not None:
        key, value = quantizer(key), quantizer(value)
    return compat.sdpa_attention(module, query, key, value, attention_mask, **kwargs)


def enable_kv_quantization(
    model: nn.Module, attentions: list[nn.Module], quantizer: KVQuantizer
) -> None:
    """Give every attention module its quantizer and switch the model to :func:`quantized_sdpa`."""
    compat.register_attention(ATTENTION_NAME, quantized_sdpa)
    for attention in attentions:
        setattr(attention, MODULE_ATTRIBUTE, quantizer)
    compat.set_attention(model, ATTENTION_NAME)
