"""The states that a causal language model hands to its head, and the head itself.

A loss over [tokens, vocab] is computed from these two, chunk by chunk: whole logits never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmqat.errors import ConfigError

__all__ = ["last_hidden", "plain_head"]

_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Configuration names that make a model's logits more than `head(hidden)`."""


def plain_head(role: str, model: nn.Module) -> nn.Linear:
    """The head, where `logits == head(last hidden states)`.

    Raises:
        ConfigError: `role`'s model has another kind of head, or changes its logits after it.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if type(head) is not nn.Linear or head.bias is not None:
        raise ConfigError(f"{role}: {type(model).__name__} has no plain linear head (without bias)")
    config = getattr(model, "config", None)
    for name in _LOGIT_TRANSFORMS:
        if getattr(config, name, None) is not None:
            raise ConfigError(
                f"{role}: {name} changes the logits after the head; such a model is not supported"
            )
    return head


def last_hidden(model: nn.Module, inputs: dict[str, Any], inner: nn.Module | None = None) -> Tensor:
    """Hidden states before the head, [B, T, H]; `model` may be a distributed wrapper of `inner`."""
    with _without_head((inner or model).get_output_embeddings()):  # type: ignore[operator]
        hidden = model(**inputs, use_cache=False).logits
    assert isinstance(hidden, Tensor)
    return hidden


@contextmanager
def _without_head(head: nn.Linear) -> Iterator[None]:
    """Let `head` hand on its input.

    The wrappers that gradients are synchronised and autocast by only act on the model's own
    forward, so the hidden states have to come out of that one.
    """
    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
