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

from llmqat.config import QuantSpec
from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat.nn.quantizers import fake_quantize

ATTENTION_NAME = "llmqat_sdpa"
MODULE_ATTRIBUTE = "llmqat_kv"


@dataclass(frozen=True)
class KVQuantizer:
    """Fake quantization of K and V [B, Hkv, T, D], one scale per token and head (spec 9,
    `serving`).
    """

    spec: QuantSpec
    ste_clip: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.spec, ste_clip=self.ste_clip)


@dataclass(frozen=True)
class TokenKVQuantizer(KVQuantizer):
    """Fake quantization of K and V [B, Hkv, T, D], one scale per token over all heads: spec 9,
    `paper`, in models that hand K to the attention function as the projection gave it (no RoPE).
    """

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)
        return super().__call__(rows).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


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
    """Give every attention module its quantizer and switch the model to :func:`quantized_sdpa`.

    From then on an attention module refuses to run with any other function: keys and values would
    not be quantized, and nothing would show it.
    """
    compat.register_attention(ATTENTION_NAME, quantized_sdpa)
    for attention in attentions:
        setattr(attention, MODULE_ATTRIBUTE, quantizer)
        attention.register_forward_pre_hook(_refuse_other_functions)
    compat.set_attention(model, ATTENTION_NAME)


def _refuse_other_functions(module: nn.Module, args: object) -> None:
    name = compat.attention_name(module)
    if name != ATTENTION_NAME:
        raise ConfigError(
            f"attention: {name!r} would leave keys and values unquantized; go back with"
            f" model.set_attn_implementation({ATTENTION_NAME!r})"
        )
