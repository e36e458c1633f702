"""Sizes of released models by name: what a command needs to know of a model nobody has to load.

A row holds what the publisher's config.json says and the family's configuration class would not
say by itself; `source` names the repository. The weight bytes of LLaMA 7B, 13B and 30B agree with
LLM-QAT's table 7 (tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmqat.errors import ConfigError
from llmqat.models import compat

__all__ = ["SHAPES", "NamedShape", "find_shape"]


@dataclass(frozen=True)
class NamedShape:
    """A released model: family, fields of its transformers configuration, and where they stand."""

    name: str
    family: str
    source: str
    fields: dict[str, Any]

    def config(self) -> Any:
        """Its transformers configuration."""
        return compat.MODELS[self.family][0](**self.fields)


def _rope3(factor: float) -> dict[str, Any]:
    """Rope scaling of Llama 3.1 and 3.2."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _theta(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


def _row(
    name: str,
    family: str,
    source: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    vocab: int,
    positions: int,
    **fields: Any,
) -> NamedShape:
    """One row; `heads` are those of Q and of K and V."""
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    }
    return NamedShape(name, family, source, {**sizes, **fields})


def _gpt2(name: str, source: str, layers: int, hidden: int, heads: int) -> NamedShape:
    fields = {"n_layer": layers, "n_embd": hidden, "n_head": heads}
    return NamedShape(name, "gpt2", source, fields)


_ROWS = (
    _row("llama-7b", "llama", "huggyllama/llama-7b", 32, 4096, 11008, (32, 32), 32000, 2048),
    _row("llama-13b", "llama", "huggyllama/llama-13b", 40, 5120, 13824, (40, 40), 32000, 2048),
    _row("llama-30b", "llama", "huggyllama/llama-30b", 60, 6656, 17920, (52, 52), 32000, 2048),
    _row("llama-65b", "llama", "huggyllama/llama-65b", 80, 8192, 22016, (64, 64), 32000, 2048),
    _row(
        *("llama-2-7b", "llama", "meta-llama/Llama-2-7b-hf"),
        *(32, 4096, 11008, (32, 32), 32000, 4096),
        rms_norm_eps=1e-5,
    ),
    _row(
        *("llama-2-13b", "llama", "meta-llama/Llama-2-13b-hf"),
        *(40, 5120, 13824, (40, 40), 32000, 4096),
        rms_norm_eps=1e-5,
    ),
    _row(
        *("llama-2-70b", "llama", "meta-llama/Llama-2-70b-hf"),
        *(80, 8192, 28672, (64, 8), 32000, 4096),
        rms_norm_eps=1e-5,
    ),
    _row(
        *("llama-3-8b", "llama", "meta-llama/Meta-Llama-3-8B"),
        *(32, 4096, 14336, (32, 8), 128256, 8192),
        rms_norm_eps=1e-5,
        rope_parameters=_theta(500000.0),
    ),
    _row(
        *("llama-3.1-8b", "llama", "meta-llama/Llama-3.1-8B"),
        *(32, 4096, 14336, (32, 8), 128256, 131072),
        rms_norm_eps=1e-5,
        rope_parameters=_rope3(8.0),
    ),
    _row(
        *("llama-3.2-1b", "llama", "meta-llama/Llama-3.2-1B"),
        *(16, 2048, 8192, (32, 8), 128256, 131072),
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters=_rope3(32.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("llama-3.2-3b", "llama", "meta-llama/Llama-3.2-3B"),
        *(28, 3072, 8192, (24, 8), 128256, 131072),
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_parameters=_rope3(32.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("smollm2-135m", "llama", "HuggingFaceTB/SmolLM2-135M"),
        *(30, 576, 1536, (9, 3), 49152, 8192),
        rms_norm_eps=1e-5,
        rope_parameters=_theta(100000.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("smollm2-360m", "llama", "HuggingFaceTB/SmolLM2-360M"),
        *(32, 960, 2560, (15, 5), 49152, 8192),
        rms_norm_eps=1e-5,
        rope_parameters=_theta(100000.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("smollm2-1.7b", "llama", "HuggingFaceTB/SmolLM2-1.7B"),
        *(24, 2048, 8192, (32, 32), 49152, 8192),
        rms_norm_eps=1e-5,
        rope_parameters=_theta(130000.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("tinyllama-1.1b", "llama", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
        *(22, 2048, 5632, (32, 4), 32000, 2048),
        rms_norm_eps=1e-5,
    ),
    _row(
        *("mistral-7b", "mistral", "mistralai/Mistral-7B-v0.1"),
        *(32, 4096, 14336, (32, 8), 32000, 32768),
        rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    _row(
        *("qwen2-0.5b", "qwen2", "Qwen/Qwen2-0.5B"),
        *(24, 896, 4864, (14, 2), 151936, 131072),
        rope_parameters=_theta(1000000.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("qwen2-7b", "qwen2", "Qwen/Qwen2-7B"),
        *(28, 3584, 18944, (28, 4), 152064, 131072),
        rope_parameters=_theta(1000000.0),
    ),
    _row(
        *("qwen3-0.6b", "qwen3", "Qwen/Qwen3-0.6B"),
        *(28, 1024, 3072, (16, 8), 151936, 40960),
        head_dim=128,
        rope_parameters=_theta(1000000.0),
        tie_word_embeddings=True,
    ),
    _row(
        *("qwen3-8b", "qwen3", "Qwen/Qwen3-8B"),
        *(36, 4096, 12288, (32, 8), 151936, 40960),
        head_dim=128,
        rope_parameters=_theta(1000000.0),
    ),
    _gpt2("gpt2", "openai-community/gpt2", 12, 768, 12),
    _gpt2("gpt2-medium", "openai-community/gpt2-medium", 24, 1024, 16),
    _gpt2("gpt2-large", "openai-community/gpt2-large", 36, 1280, 20),
    _gpt2("gpt2-xl", "openai-community/gpt2-xl", 48, 1600, 25),
)
SHAPES: dict[str, NamedShape] = {row.name: row for row in _ROWS}
"""Released models by name, grouped by family."""


def find_shape(name: str) -> NamedShape:
    """The row called `name`; ConfigError lists the known ones."""
    if name not in SHAPES:
        raise ConfigError(f"shape: {name!r} is unknown; use one of {', '.join(SHAPES)}")
    return SHAPES[name]
