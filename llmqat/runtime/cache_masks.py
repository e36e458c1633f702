"""Masks of transformers' causal attention over padded batches, read back.

Which columns hold tokens, and whether every token sees what a quantized cache shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmqat.errors import ConfigError
from llmqat_kernels.errors import InvalidArgument

HIDDEN = -1e3
"""What a float mask adds at most where it hides: softmax has nothing left there in any dtype."""
READABLE = "give the mask of all tokens so far, 1 for tokens, 0 for padding"


def not_causal() -> InvalidArgument:
    """What a mask is refused with that is not causal."""
    return InvalidArgument(
        "attention_mask: only causal attention over padded batches, without windows and without"
        f" hiding or showing other tokens; {READABLE}"
    )


def check_form(mask: Any, batch: int, length: int, columns: int) -> None:
    """Refuse what is no mask [B or 1, 1 or H, T, columns]."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        form = f"a {mask.dim()}-D mask" if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(
            f"attn_implementation: a QuantizedCache reads the 4-D masks of sdpa and eager, not"
            f' {form}; call model.set_attn_implementation("sdpa")'
        )
    if mask.shape[0] not in (1, batch) or mask.shape[2:] != (length, columns):
        raise InvalidArgument(
            f"attention_mask: shape {list(mask.shape)} is not [{batch}, 1, {length}, {columns}]"
            f" (sequences, heads, new tokens, all tokens); {READABLE}"
        )


def _shown_and_hidden(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask lets a token see and where not; a bias of a float mask is neither."""
    return (mask, ~mask) if mask.dtype == torch.bool else (mask == 0, mask <= HIDDEN)


def new_columns(mask: Tensor | None, before: Tensor, length: int) -> Tensor:
    """bool [B, T]: which new columns hold tokens. Causal: a token sees itself, padding sees
    nothing.
    """
    batch, seen = before.shape
    if mask is None:
        return torch.ones((batch, length), dtype=torch.bool, device=before.device)
    check_form(mask, batch, length, seen + length)
    itself = mask[:, 0].diagonal(offset=seen, dim1=-2, dim2=-1)
    return ~_shown_and_hidden(itself)[1].expand(batch, length)


def is_causal(mask: Tensor | None, real: Tensor, new: Tensor) -> Tensor:
    """bool []: whether every token sees the tokens up to itself, and no others.

    Args:
        real: bool [B, columns], which columns hold tokens. new: its last T.
    """
    if mask is None:  # transformers leaves it out where nothing is hidden
        return real.all()
    length, columns = mask.shape[-2:]
    causal = real.new_ones((length, columns)).tril(columns - length)
    shown, hidden = _shown_and_hidden(mask)
    agrees = torch.where(real[:, None, None, :] & causal, shown, hidden)
    return (agrees | ~new[:, None, :, None]).all()  # what padding sees does not matter
