"""Token sampling with counter-based random numbers: spec 15 and 16."""

from __future__ import annotations

import torch
from torch import Tensor

from .math import log

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
MASK32 = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the product of two 32-bit numbers, without overflowing int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    carry = high + (low >> 16)
    return carry >> 16, ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors holding 32-bit words -> four such tensors (spec 15)."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply(PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + PHILOX_WEYL[0]) & MASK32, (key1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def uniform(record: Tensor, step: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Uniform fp32 numbers in (0, 1), [n, vocabulary], for record, step int64 [n] (spec 15)."""
    quads = (vocabulary + 3) // 4
    index = torch.arange(quads, dtype=torch.int64, device=record.device).expand(
        record.shape[0], quads
    )
    words = philox(
        (
            index,
            (step & MASK32).unsqueeze(-1).expand_as(index),
            (record & MASK32).unsqueeze(-1).expand_as(index),
            ((record >> 32) & MASK32).unsqueeze(-1).expand_as(index),
        ),
        seed,
    )
    word = torch.stack(words, dim=-1).flatten(-2)[:, :vocabulary]
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(u: Tensor) -> Tensor:
    """Gumbel noise ``-log(-log(u))`` of uniform fp32 ``u`` (spec 16)."""
    return -log(-log(u))


def sample(
    logits: Tensor,
    record: Tensor,
    step: Tensor,
    greedy: Tensor,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """Next token of each row of logits [n, V] -> int64 [n]; -1 for a row that has none (spec 16).

    ``record``, ``step`` int64 [n] and ``seed`` decide the noise, whatever the batch; rows with
    ``greedy`` (bool [n]) take the first largest logit.
    """
    if logits.shape[0] == 0 or logits.shape[1] == 0:
        return torch.full((logits.shape[0],), -1, dtype=torch.int64, device=logits.device)
    wide = logits.to(torch.float32)
    noise = gumbel(uniform(record, step, logits.shape[1], seed))
    scores = torch.div(wide, torch.full_like(wide, temperature)) + noise
    if 0 < top_k < logits.shape[1]:
        # A stable sort puts the smaller index first among equal logits.
        order = torch.sort(wide, dim=-1, descending=True, stable=True).indices
        outside = torch.ones_like(wide, dtype=torch.bool).scatter_(-1, order[:, :top_k], False)
        scores = scores.masked_fill(outside, float("-inf"))
    scores = torch.where(greedy.unsqueeze(-1), wide, scores)
    # argmax does not promise the first index of equal values; the largest reversed rank does.
    best = scores == scores.amax(dim=-1, keepdim=True)
    rank = torch.arange(logits.shape[1], 0, -1, device=logits.device)
    tokens = torch.argmax(torch.where(best, rank, torch.zeros_like(rank)), dim=-1)
    usable = ~torch.isnan(wide).any(dim=-1) & torch.isfinite(wide).any(dim=-1)
    return torch.where(usable, tokens, torch.full_like(tokens, -1))
