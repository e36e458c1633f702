"""Which models the engine runs: the families whose blocks are LLaMA's, within their window."""

from __future__ import annotations

from torch import nn

from llmqat.errors import ConfigError
from llmqat.models.families import Family
from llmqat_kernels.errors import InvalidArgument

DEFAULT_MAX_LEN = 2048


def attention_window(model: nn.Module) -> int | None:
    """Tokens that the narrowest block of the model attends to; None where all attend to all."""
    config = model.config
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return window


def default_max_len(model: nn.Module) -> int:
    """2048 tokens or, if fewer, the positions or the attention window of the model."""
    longest: int = model.config.max_position_embeddings
    return min(DEFAULT_MAX_LEN, longest, attention_window(model) or longest)


def has_engine(family: Family) -> bool:
    """Whether the engine has code for the family's blocks."""
    return family.positions is None


def check_runnable(model: nn.Module, family: Family, max_len: int) -> None:
    """Refuse what the engine has no code for, before any weight is copied.

    Raises:
        ConfigError: a family or an activation. InvalidArgument: `max_len` beyond the model's
            positions or its sliding window (shorter sequences never leave the window).
    """
    if not has_engine(family):
        raise ConfigError(
            f"model: the engine does not run {family.architecture} (learned positions, LayerNorm);"
            " use llmqat.TransformersEngine"
        )
    config = model.config
    if not 1 <= max_len <= config.max_position_embeddings:
        raise InvalidArgument(
            f"max_len: {max_len} is outside 1..{config.max_position_embeddings} (model positions)"
        )
    window = attention_window(model)
    if window is not None and max_len > window:
        raise InvalidArgument(
            f"max_len: {max_len} is longer than the model's sliding window of {window} tokens; the"
            f" engine has no windows, use at most {window}"
        )
    if config.hidden_act != "silu":
        raise ConfigError(
            f"model: activation {config.hidden_act!r} is not supported; the engine runs silu"
        )


def check_cache(family: Family, kv_bits: int, kv_mode: str) -> None:
    """ConfigError for a KV cache that could not give the model's own keys back."""
    if family.head_norms and kv_mode == "paper" and kv_bits < 16:
        raise ConfigError(
            f"kv_mode: paper quantizes keys before the norm that {family.architecture} has between"
            " k_proj and RoPE; the engine's cache holds them behind it; use kv_mode serving, or"
            " kv_bits 16"
        )
