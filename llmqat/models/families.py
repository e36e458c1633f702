"""The table of architectures: where a model's parts are, which linears a block has, what differs.

A family is a `model_type` of transformers; LLaMA 1, 2 and 3, TinyLlama and SmolLM2 are all `llama`.
The sizes of released models are in `shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from llmqat.errors import ConfigError

NEVER, ALWAYS = "never", "always"
"""When linears have biases; otherwise the name of the config's switch."""


@dataclass(frozen=True)
class Family:
    """One architecture. Paths are relative to the model (`blocks`, `norm`, `embedding`,
    `positions`) or to one block (the rest).

    Attributes:
        architecture: the model's class in transformers.
        blocks, norm, embedding: the list of blocks, the last norm, the token embedding.
        linears: what the method quantizes in a block, in the order in which it runs.
        attention: the attention module.
        kv_linears: linears whose whole output is K or V; empty where one linear holds both (there K
            and V are quantized in the attention function, which sees the same numbers).
        norms: the norms of a block that are as wide as the model.
        head_norms: norms of each head of Q and K, between the projections and RoPE.
        bias: (when, linears): `NEVER`, `ALWAYS` or the switch in the config.
        norm_bias: whether norms have a bias (LayerNorm).
        positions: the learned positions; None where RoPE turns Q and K.
        transposed: linears are `Conv1D` of transformers, whose weight is [K, N].
        base_prefix: what a checkpoint of the model without its head leaves out of every name.
    """

    name: str
    architecture: str
    blocks: str = "model.layers"
    norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    linears: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    attention: str = "self_attn"
    kv_linears: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    bias: tuple[tuple[str, tuple[str, ...]], ...] = ()
    norm_bias: bool = False
    positions: str | None = None
    transposed: bool = False
    base_prefix: str | None = None

    @property
    def linear_class(self) -> str:
        """The class of its linears in a plain model: `Linear` or `Conv1D`."""
        return "Conv1D" if self.transposed else "Linear"

    def bias_switch(self, linear: str) -> str:
        """When `linear` has a bias: `NEVER`, `ALWAYS`, or the name of the config's switch."""
        return next((when for when, names in self.bias if linear in names), NEVER)

    def is_linear(self, module: nn.Module) -> bool:
        """Whether `module` is exactly what transformers puts in the place of a linear."""
        return type(module) is nn.Linear or (
            self.transposed and type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            bias=(("attention_bias", _ATTENTION), ("mlp_bias", _MLP)),
        ),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", bias=((ALWAYS, _QKV),)),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
            bias=(("attention_bias", _ATTENTION),),
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            blocks="transformer.h",
            norm="transformer.ln_f",
            embedding="transformer.wte",
            linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            attention="attn",
            kv_linears=(),
            norms=("ln_1", "ln_2"),
            bias=((ALWAYS, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),),
            norm_bias=True,
            positions="transformer.wpe",
            transposed=True,
            base_prefix="transformer.",
        ),
    )
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
