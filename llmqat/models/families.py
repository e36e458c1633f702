"""The one table of model families: which linears a block has and what a config may say.

A family is a `model_type` of transformers; LLaMA 1, 2 and 3, TinyLlama and SmolLM2 are all `llama`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from llmqat.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Names of one architecture. Paths are relative to the model (`blocks`, and `norm`, the last
    one) or to one block (the rest).
    """

    name: str
    architecture: str
    blocks: str
    norm: str
    linears: tuple[str, ...]
    attention: str
    kv_linears: tuple[str, ...]
    attention_bias: tuple[str, ...]
    mlp_bias: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        name="llama",
        architecture="LlamaForCausalLM",
        blocks="model.layers",
        norm="model.norm",
        linears=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ),
        attention="self_attn",
        kv_linears=("self_attn.k_proj", "self_attn.v_proj"),
        attention_bias=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ),
        mlp_bias=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
}


def supported() -> str:
    """For messages: what this package can quantize."""
    return ", ".join(
        f"{family.architecture} (model_type {name})" for name, family in FAMILIES.items()
    )


def find_family(model: nn.Module) -> Family:
    """The family of a transformers model; ConfigError names the model and what is supported."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not any(
        cls.__name__ == family.architecture for cls in type(model).__mro__
    ):
        raise ConfigError(
            f"model: {type(model).__name__} (model_type {model_type}) is not supported; supported:"
            f" {supported()}"
        )
    return family


def iter_blocks(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """(full name, module) of every decoder block, in order."""
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        yield f"{family.blocks}.{index}", block


def iter_linears(model: nn.Module, family: Family) -> Iterator[tuple[str, str, nn.Module]]:
    """(full name, name within the block, module) of every linear that the method quantizes.

    Raises:
        ConfigError: a block lacks one of its linears.
    """
    for prefix, block in iter_blocks(model, family):
        for name in family.linears:
            try:
                module = block.get_submodule(name)
            except AttributeError as error:
                raise ConfigError(
                    f"model: {prefix} has no {name}; is this a {family.architecture}?"
                ) from error
            yield f"{prefix}.{name}", name, module
