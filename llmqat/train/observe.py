"""What the decoder blocks computed in a forward: their outputs, and queries and keys.

The losses "hidden" and "attention" compare these between student and teacher. Fast attention never
has the probabilities, so queries and keys are taken where every model of the library hands them
over (after the rotary embedding, to its attention function) and the probabilities are computed
again by the loss, a few rows at a time. Nothing in a block changes: no operation is added inside,
so gradient checkpointing recomputes a block as if nobody had looked, and both KV modes and fused
blocks are seen with the keys that they attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat.models.families import find_family, iter_blocks
from llmqat.nn.attention import MODULE_ATTRIBUTE

__all__ = ["BlockObserver", "BlockState", "parse_layers"]


@dataclass
class BlockState:
    """What one decoder block computed; None where nobody asked.

    Attributes:
        hidden: float [B, T, H], the block's output (of the last block: before the last norm).
        query: float [B, Hq, T, D] after the rotary embedding.
        key: float [B, Hkv, T, D] after it, as a cache would keep it.
        mask: bool [B, 1, T, T] of the keys that count, a float addend of that shape, or None for
            all earlier ones.
        scaling: what the scores are multiplied by.
        key_quantizer: what attention applies to `key` before use (`serving` KV mode), or None.
    """

    hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    scaling: float = 1.0
    key_quantizer: Callable[[Tensor], Tensor] | None = None


class BlockObserver:
    """Watches the forwards of one model.

    Args:
        role: the model's name in messages.
        model: of a known family; prepared, fused or plain.
        layers: a value of :func:`parse_layers`.
        hidden, attention: what to keep of them.

    Raises:
        ConfigError: a layer that the model does not have, or attention that cannot be watched.
    """

    def __init__(
        self,
        role: str,
        model: nn.Module,
        layers: tuple[int, ...] | None,
        *,
        hidden: bool,
        attention: bool,
    ) -> None:
        family = find_family(model)
        blocks = list(iter_blocks(model, family))
        if layers is not None and not all(-len(blocks) <= layer < len(blocks) for layer in layers):
            raise ConfigError(
                f"loss_layers: the {role} has blocks 0..{len(blocks) - 1}, got {list(layers)}"
            )
        chosen = range(len(blocks)) if layers is None else layers
        self.role = role
        self._model = model
        self._blocks = [blocks[layer] for layer in chosen]
        self._attentions = [block.get_submodule(family.attention) for _, block in self._blocks]
        self._hidden = hidden
        self._attention = attention
        if attention and compat.attention_name(model) in (None, "eager"):
            raise ConfigError(
                f"loss: attention needs the {role} in sdpa attention, not eager;"
                " load it with attn_implementation='sdpa'"
            )

    def __len__(self) -> int:
        return len(self._blocks)

    @contextmanager
    def watch(self) -> Iterator[list[BlockState]]:
        """Within it, one forward fills the list, a state per watched block.

        Raises:
            ConfigError: the model handed no queries and keys to an attention function.
        """
        states = [BlockState() for _ in self._blocks]
        with ExitStack() as stack:
            if self._hidden:
                for (_, block), state in zip(self._blocks, states, strict=True):
                    stack.callback(block.register_forward_hook(_keeper(state)).remove)
            if self._attention:
                name = str(compat.attention_name(self._model))
                stack.enter_context(compat.attention_replaced(name, self._observing(states)))
            yield states
        for (name, _), state in zip(self._blocks, states, strict=True):
            if self._attention and state.query is None:
                raise ConfigError(
                    f"loss: {name} of the {self.role} calls no attention function of transformers;"
                    " leave attention out of the loss"
                )

    def _observing(self, states: list[BlockState]) -> Callable[..., Any]:
        function = compat.attention_function(self._attentions[0])
        by_module = {id(m): state for m, state in zip(self._attentions, states, strict=True)}

        def observe(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            **named: Any,
        ) -> Any:
            state = by_module.get(id(module))
            if state is not None:
                scaling = named.get("scaling")
                state.query, state.key, state.mask = query, key, attention_mask
                state.scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
                state.key_quantizer = getattr(module, MODULE_ATTRIBUTE, None)
            return function(module, query, key, value, attention_mask, **named)

        return observe


def _keeper(state: BlockState) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        state.hidden = output[0] if isinstance(output, tuple) else output

    return keep


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Block indices: "all" (None), "last", or numbers such as "0,5,-1"; ConfigError otherwise."""
    if text == "all":
        return None
    if text == "last":
        return (-1,)
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--loss-layers: {text!r} is not supported; use all, last or numbers such as 0,5,11"
        ) from error
    if len(set(layers)) != len(layers):
        raise ConfigError(f"--loss-layers: {text!r} names a block twice")
    return layers
