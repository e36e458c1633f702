"""Tiny random LLaMA models for tests: seconds to nothing, logits far from uniform
(initializer_range 0.2).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.config import QATConfig
from llmqat.convert import convert


def tiny_llama(
    seed: int = 0,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    layers: int = 2,
    vocab: int = 128,
    tied: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> LlamaForCausalLM:
    """A LLaMA in eval mode. `kv_heads == heads` is MHA; `bias` gives every linear of a block a
    random bias.
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=heads * head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        pad_token_id=0,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def random_tokens(seed: int, batch: int, length: int, vocab: int = 128) -> torch.Tensor:
    """Token ids int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (batch, length), generator=generator)


def packed_llama(
    setting: str = "4-8-4", seed: int = 0, variant: dict[str, Any] | None = None, **fields: Any
) -> torch.nn.Module:
    """A converted tiny LLaMA; `variant` goes to :func:`tiny_llama`, `fields` to the QATConfig."""
    return convert(tiny_llama(seed, **(variant or {})), QATConfig.parse(setting, **fields))
