"""Losses between decoder blocks of student and teacher: "hidden" and "attention" (LLM-QAT table 5).

The paper names both terms and gives neither formula, layers nor weights. Here:

    hidden:    mean over blocks, valid tokens and channels of (student - teacher)^2, of the blocks'
               outputs (the residual stream; after the last block before the last norm)
    attention: mean over blocks, heads and valid query rows of KL(teacher || student) of the
               attention probabilities, whose keys are quantized where the student's are

Both in fp32 and 0 for a perfect student. Each works block by block and is recomputed in backward;
attention also walks over query rows, so that [heads, T, T] never exists whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmqat.errors import ConfigError
from llmqat.train.observe import BlockState

__all__ = ["attention_divergence", "hidden_distance"]

_MAP_ELEMENTS = 2**24
"""Attention probabilities of one model that exist at one time: 64 MiB of fp32."""

_MASKED = -1e30
"""Score of a key that does not count: finite, so that a row without any key is no NaN."""


def hidden_distance(
    student: Sequence[BlockState], teacher: Sequence[BlockState], valid: Tensor | None
) -> Tensor:
    """Mean squared error of the blocks' outputs, fp32 scalar.

    Args:
        student, teacher: the same number of blocks, with `hidden` [B, T, H].
        valid: bool [B, T] of tokens that count, or None for all.

    Raises:
        ConfigError: the models have different hidden sizes.
    """
    total = _zero(student[0].hidden)
    for own, other in zip(student, teacher, strict=True):
        a, b = own.hidden, other.hidden
        assert a is not None
        assert b is not None
        if a.shape != b.shape:
            raise ConfigError(
                f"loss: hidden needs a teacher of the student's hidden size {a.shape[-1]}, got"
                f" {b.shape[-1]}; leave hidden out of the loss"
            )
        total = total + checkpoint(_squared_error, a, b, valid, use_reentrant=False)
    return total / len(student)


def _squared_error(a: Tensor, b: Tensor, valid: Tensor | None) -> Tensor:
    error = a.float() - b.float()
    if valid is None:
        return error.square().mean()
    # Before the square: a padded token may hold NaN, whose gradient a mask after it would keep.
    error = error.masked_fill(~valid.unsqueeze(-1), 0.0)
    return error.square().sum() / (valid.sum().clamp(min=1) * error.shape[-1])


def attention_divergence(
    student: Sequence[BlockState], teacher: Sequence[BlockState], valid: Tensor | None
) -> Tensor:
    """Mean KL divergence of the attention probabilities, fp32 scalar.

    Args:
        student, teacher: the same number of blocks, with `query` [B, Hq, T, D] and `key`
            [B, Hkv, T, D].
        valid: bool [B, T] of query rows that count, or None for all.

    Raises:
        ConfigError: the models have different numbers of heads.
    """
    total = _zero(student[0].query)
    for own, other in zip(student, teacher, strict=True):
        total = total + _block_divergence(own, other, valid)
    return total / len(student)


def _block_divergence(own: BlockState, other: BlockState, valid: Tensor | None) -> Tensor:
    assert own.query is not None
    assert other.query is not None
    batch, heads, tokens, _ = own.query.shape
    if other.query.shape[1] != heads:
        raise ConfigError(
            f"loss: attention needs a teacher of the student's {heads} heads, got"
            f" {other.query.shape[1]}; leave attention out of the loss"
        )
    keys = [_keys(state) for state in (own, other)]
    total = _zero(own.query)
    step = max(1, _MAP_ELEMENTS // (batch * heads * tokens))
    for begin in range(0, tokens, step):
        rows = slice(begin, min(begin + step, tokens))
        total = total + checkpoint(
            _rows_divergence,
            rows,
            valid,
            (own.query[:, :, rows], keys[0], own.mask, own.scaling),
            (other.query[:, :, rows], keys[1], other.mask, other.scaling),
            use_reentrant=False,
        )
    return total / (heads * (batch * tokens if valid is None else valid.sum().clamp(min=1)))


def _keys(state: BlockState) -> Tensor:
    assert state.key is not None
    return state.key if state.key_quantizer is None else state.key_quantizer(state.key)


_Operands = tuple[Tensor, Tensor, Tensor | None, float]


def _rows_divergence(
    rows: slice, valid: Tensor | None, student: _Operands, teacher: _Operands
) -> Tensor:
    """Summed KL divergence of the query rows `rows`."""
    log_q, log_p = _log_probabilities(rows, *student), _log_probabilities(rows, *teacher)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).flatten(1, -2).sum(1)  # [B, rows]
    if valid is not None:
        divergence = divergence.masked_fill(~valid[:, rows], 0.0)
    return divergence.sum()


def _log_probabilities(
    rows: slice, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """fp32 [B, Hkv, Hq / Hkv, rows, T]: heads that share keys lie together."""
    batch, heads, count, width = query.shape
    groups = key.shape[1]
    query = query.float().reshape(batch, groups, heads // groups, count, width)
    # The operands are fp32 on purpose: autocast would round the scores.
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.float().unsqueeze(2).transpose(-1, -2) * scaling
    if mask is None:
        at = torch.arange(rows.start, rows.stop, device=query.device)
        keep = torch.arange(key.shape[2], device=query.device) <= at.unsqueeze(-1)
        scores = scores.masked_fill(~keep, _MASKED)
    else:
        part = mask[:, :, rows].unsqueeze(2)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~part, _MASKED)
        else:
            scores = (scores + part.float()).clamp(min=_MASKED)
    return torch.log_softmax(scores, -1)


def _zero(like: Tensor | None) -> Tensor:
    assert like is not None
    return torch.zeros((), dtype=torch.float32, device=like.device)
