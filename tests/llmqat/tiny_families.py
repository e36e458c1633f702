"""A tiny random model of every family, with what makes the family special: grouped heads, biases,
norms of heads, windows, learned positions.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from llmqat.models.compat import MODELS

_COMMON = {
    "vocab_size": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "head_dim": 32, "attention_bias": True},
    "gpt2": {
        **_COMMON,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "n_inner": 96,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def tiny_model(
    family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **fields: Any
) -> PreTrainedModel:
    """A model of `family` in eval mode, biases and norms random too; `fields` go to its config."""
    config_class, model_class = MODELS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**FIELDS[family], **fields}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(std=0.1)
                elif parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval()
