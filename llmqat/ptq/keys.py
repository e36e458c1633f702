"""Smoothed keys: even out the channels of K, at no cost, before it is quantized to few bits.

Rotary embedding turns the channels (c, c + D/2) of a key as one plane. Scaling such a pair of K by
1/s and the same pair of Q by s changes no product of the two, before or after the rotation; the
scales are rows of the weights of k_proj and q_proj, whose grids are per row and scale along. So
nothing else is quantized differently, and a key whose pairs have like lengths loses less in either
KV mode (SmoothAttention, Lin et al. 2024, has alpha 0.5 and statistics of single channels).

    s_c = max over tokens of |(K_c, K_c+D/2)| ^ alpha, of every KV head, geometric mean 1
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmqat.errors import ConfigError
from llmqat.models.families import Family

__all__ = ["PairLengths", "check_smoothable_keys", "fold_keys", "key_scale"]


def check_smoothable_keys(family: Family) -> None:
    """ConfigError unless the family's keys are rotated outputs of k_proj."""
    if not family.kv_linears or family.head_norms or family.positions is not None:
        raise ConfigError(
            f"key_alpha: keys of {family.architecture} are not rotated outputs of k_proj; leave it"
            " out"
        )


class PairLengths:
    """The longest pair of every plane that the keys of a block showed: fp32 [KV heads, D / 2]."""

    def __init__(self, key_linear: nn.Module, config: object) -> None:
        self._linear = key_linear
        self._kv_heads = config.num_key_value_heads
        self.largest: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x float [..., H]: what k_proj is given."""
        # Not through the module: it is its own hook that calls this.
        keys = F.linear(x, self._linear.weight, self._linear.bias).detach().float()
        pairs = keys.reshape(-1, self._kv_heads, 2, keys.shape[-1] // self._kv_heads // 2)
        longest = pairs.square().sum(2).sqrt().amax(0)
        self.largest = longest if self.largest is None else torch.maximum(self.largest, longest)


def key_scale(lengths: Tensor, alpha: float) -> Tensor:
    """`s` of every plane, fp32 [KV heads, D / 2], geometric mean 1 over all; planes that are always
    zero keep 1 beside the others.

    Raises:
        ConfigError: NaN or infinite lengths.
    """
    if not bool(torch.isfinite(lengths).all()):
        raise ConfigError("key_alpha: keys hold NaN or infinite values; check the model")
    used = lengths > 0
    logs = torch.where(used, lengths, torch.ones_like(lengths)).log() * alpha
    mean = logs.sum() / used.sum().clamp(min=1)
    return torch.where(used, (logs - mean).exp(), torch.ones_like(lengths))


@torch.no_grad()
def fold_keys(attention: nn.Module, scale: Tensor, config: object) -> None:
    """Divide the planes of K by `scale` [KV heads, D / 2] and multiply those of Q, in the rows of
    k_proj and q_proj (weights and biases); query heads that share keys share their scales.
    """
    channels = torch.cat([scale, scale], 1)
    shared = config.num_attention_heads // config.num_key_value_heads
    for linear, factor in (
        (attention.k_proj, 1 / channels),
        (attention.q_proj, channels.repeat_interleave(shared, 0)),
    ):
        rows = factor.reshape(-1)
        linear.weight.copy_(linear.weight.float() * rows.unsqueeze(1))
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.float() * rows)
