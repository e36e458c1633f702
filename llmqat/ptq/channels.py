"""Scaling channels between a linear and what stands before it, without changing the float model.

A linear's input channel j may be divided by s_j if its weight column j is multiplied by s_j. The
division costs nothing where the producer of the input can absorb it: the weight of the preceding
norm, or the rows of the preceding linear. This table says which producer that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmqat.errors import ConfigError
from llmqat.models.families import Family
from llmqat.nn.conv1d import row_weight

__all__ = ["FOLDS", "InputGroup", "fold", "foldable_groups", "input_groups", "widest_folds"]

FOLDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "norms": ("norm",),
    "norms+down": ("norm", "product"),
    "all": ("norm", "product", "values"),
}
"""Which producers may absorb scales, by the name of the option."""


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read the same input, and its producer.

    Attributes:
        linears: names within the block, in the order in which they run.
        producer: name of the module that absorbs scales.
        kind: "norm" (its weight, and bias), "product" (a linear whose output is multiplied
            elementwise by something else), "activation" or "fused" (a nonlinearity stands between,
            or the linear computes q and k too: neither can absorb) or "values" (v_proj: attention
            mixes tokens but not channels; with grouped queries one row of it feeds several heads,
            which then share their scale).
    """

    linears: tuple[str, ...]
    producer: str
    kind: str


_LLAMA = (
    InputGroup(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"
    ),
    InputGroup(("self_attn.o_proj",), "self_attn.v_proj", "values"),
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm"),
    InputGroup(("mlp.down_proj",), "mlp.up_proj", "product"),
)


_GPT2 = (
    InputGroup(("attn.c_attn",), "ln_1", "norm"),
    InputGroup(("attn.c_proj",), "attn.c_attn", "fused"),
    InputGroup(("mlp.c_fc",), "ln_2", "norm"),
    InputGroup(("mlp.c_proj",), "mlp.c_fc", "activation"),
)


def input_groups(family: Family) -> tuple[InputGroup, ...]:
    """The groups of one block in running order; every linear of the family is in one of them.

    Raises:
        ConfigError: the family's blocks are built in neither of the known ways.
    """
    for groups in (_LLAMA, _GPT2):
        names = [name for group in groups for name in group.linears]
        if sorted(names) == sorted(family.linears):
            return groups
    raise ConfigError(
        f"model: the blocks of {family.architecture} are not built like LLaMA's; use"
        " method rtn, or quantization-aware training"
    )


def widest_folds(family: Family, limit: str = "all") -> str:
    """The widest option of `FOLDS` up to `limit` whose producers the family has.

    Raises:
        ConfigError: as `input_groups`.
    """
    kinds = {group.kind for group in input_groups(family)}
    names = list(FOLDS)[: list(FOLDS).index(limit) + 1]
    return [name for name in names if set(FOLDS[name]) <= kinds][-1]


def foldable_groups(family: Family, folds: str) -> list[InputGroup]:
    """The groups whose producer may absorb scales under the option `folds`, in running order.

    Raises:
        ConfigError: `folds` asks for a producer that the family does not have.
    """
    groups = input_groups(family)
    for kind in FOLDS[folds]:
        if not any(group.kind == kind for group in groups):
            raise ConfigError(
                f"folds: {folds} needs a linear that could absorb the scales, which the blocks of"
                f" {family.architecture} do not have; use norms"
            )
    return [group for group in groups if group.kind in FOLDS[folds]]


def merge_heads(channels: Tensor, config: object) -> Tensor:
    """o_proj's input channels [heads * D] as [query heads per KV head, KV heads * D]."""
    kv_heads = config.num_key_value_heads
    shared = config.num_attention_heads // kv_heads
    return channels.view(kv_heads, shared, -1).transpose(0, 1).reshape(shared, -1)


def spread_heads(channels: Tensor, config: object) -> Tensor:
    """A scale of every KV channel [KV heads * D] for all input channels of o_proj [heads * D]."""
    kv_heads = config.num_key_value_heads
    shared = config.num_attention_heads // kv_heads
    return channels.view(kv_heads, 1, -1).expand(-1, shared, -1).reshape(-1)


@torch.no_grad()
def fold(block: nn.Module, group: InputGroup, scale: Tensor, config: object) -> None:
    """Divide the group's input channels by `scale`: in the producer, and back in the weights.

    Args:
        scale: float [K] of positive numbers; for "values" one of every KV channel.
        config: the model's configuration (heads).
    """
    scale = scale.float()
    producer = block.get_submodule(group.producer)
    for name in ("weight", "bias"):
        tensor = getattr(producer, name, None)
        if tensor is not None:
            divisor = scale if tensor.dim() == 1 else scale.unsqueeze(1)
            tensor.copy_(tensor.float() / divisor)
    columns = spread_heads(scale, config) if group.kind == "values" else scale
    for name in group.linears:
        weight = row_weight(block.get_submodule(name))
        weight.copy_(weight.float() * columns)
