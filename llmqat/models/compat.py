"""The only file that relies on how transformers 5.x is built inside; checked on 5.17.0 and the
newest 5.x.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    eager_attention_forward,
)
from transformers.pytorch_utils import Conv1D

from llmqat.errors import ConfigError

MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}
"""Configuration and model of every family of `families.FAMILIES`."""

__all__ = [
    "MODELS",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "LlamaAttention",
    "LlamaDecoderLayer",
    "attention_function",
    "attention_name",
    "attention_replaced",
    "build_model",
    "generation_config",
    "generation_fields",
    "keep_blocks_whole",
    "own_config",
    "register_attention",
    "restore_rotary",
    "sdpa_attention",
    "set_attention",
    "tie_head",
]


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The library's scaled-dot-product attention function."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make `function` selectable by name, with sdpa's masks. Repeating it is harmless."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def set_attention(model: nn.Module, name: str) -> None:
    """Switch every attention module of the model to the registered function `name`."""
    model.set_attn_implementation(name)
    if attention_name(model) != name:
        raise ConfigError(
            f"model: {type(model).__name__} did not accept attention {name}; it needs sdpa"
            " attention"
        )


def attention_name(model: nn.Module) -> str | None:
    """The attention function that the model uses."""
    return model.config._attn_implementation


def attention_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that an attention module's config selects: sdpa, eager, flash, ..."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )


@contextmanager
def attention_replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within it, every model whose attention is called `name` calls `function` instead."""
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def keep_blocks_whole(model: nn.Module, block: str) -> None:
    """Tell device maps and sharded training that `block` is the class name of the blocks."""
    for module in model.modules():
        if getattr(module, "_no_split_modules", None):
            module._no_split_modules = {block}


def own_config(model: nn.Module) -> None:
    """Give the model a config object that no other model shares.

    `LlamaForCausalLM(teacher.config)` shares the teacher's config: without this, what prepare
    records (and the attention function it selects) would change the teacher too.
    """
    shared = model.config
    private = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = private


def build_model(model_type: str, fields: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model on the meta device (no weights allocated); its rotary tables are real, they are in no
    checkpoint.

    Args:
        model_type: a key of `MODELS`.
        fields: validated fields of its configuration.
    """
    config_class, model_class = MODELS[model_type]
    config = config_class(**fields)
    config.dtype = dtype
    with torch.device("meta"):
        model = model_class(config)
    restore_rotary(model)
    return model.eval()


def restore_rotary(model: nn.Module) -> None:
    """Compute the rotary frequencies anew in fp32, where the embedding is (on the CPU for meta).

    `model.to(bfloat16)` rounds them, although they are in no checkpoint: such a model would
    differ from itself after saving and loading. Models with learned positions have none.
    """
    base = model.base_model
    if getattr(base, "rotary_emb", None) is None:
        return
    device = model.get_input_embeddings().weight.device
    rotary = type(base.rotary_emb)(model.config)
    base.rotary_emb = rotary if device.type == "meta" else rotary.to(device)


def tie_head(model: nn.Module) -> None:
    """Share the embedding with the head where the config says so."""
    model.tie_weights()


def generation_config(fields: Mapping[str, Any]) -> GenerationConfig:
    """A generation config from the JSON object of a checkpoint.

    Only fields that transformers knows, with plain values: numbers, strings, true, false, null,
    lists of integers. ValueError or TypeError names any other.
    """
    known = GenerationConfig().to_dict().keys() | {"_from_model_config", "transformers_version"}
    for key, value in fields.items():
        ids = isinstance(value, list) and all(type(item) is int for item in value)
        if key not in known or not (
            ids or value is None or isinstance(value, bool | int | float | str)
        ):
            raise ValueError(f"{key[:40]!a} is not a plain generation setting; remove it")
    return GenerationConfig.from_dict(dict(fields))


def generation_fields(model: nn.Module) -> dict[str, Any] | None:
    """The JSON object of a model's generation config, or None where it has none."""
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_diff_dict()
