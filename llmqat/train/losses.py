"""Training losses by name: what the student is pulled towards (LLM-QAT Eq. 4 and table 5).

A loss reads a `LossInputs`: hidden states before the heads, never whole logits. Each walks over
chunks of tokens, so [tokens, vocab] exists for one chunk at a time. A variant that needs more of
the models (attention maps, hidden states of all layers) adds a field to `LossInputs` and an entry
to `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import llmqat_kernels as qk
from llmqat.errors import ConfigError

__all__ = ["IGNORED_LABEL", "LOSSES", "Loss", "LossInputs", "find_loss"]

IGNORED_LABEL = -100
"""The label of a token that is not predicted, as everywhere in torch and transformers."""


@dataclass(frozen=True)
class LossInputs:
    """What a loss may read. B sequences of T tokens, vocabulary V.

    Attributes:
        student_hidden: float [B, T, H], the output of the last norm.
        student_head: float [V, H], same dtype.
        teacher_hidden: float [B, T, H'] or None where the loss needs no teacher.
        teacher_head: float [V, H'] or None.
        labels: int64 [B, T], token t is predicted at t - 1; `IGNORED_LABEL` is skipped.
        valid: bool [B, T] of tokens that count, or None for all.
        chunk_size: tokens whose logits exist at one time.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    labels: Tensor
    valid: Tensor | None = None
    chunk_size: int = 1024


@dataclass(frozen=True)
class Loss:
    """A named loss: `compute(inputs)` is an fp32 scalar, the mean over valid tokens."""

    name: str
    compute: Callable[[LossInputs], Tensor]
    needs_teacher: bool


def _logits(inputs: LossInputs) -> Tensor:
    """Cross entropy of teacher against student probabilities, temperature 1 (Eq. 4, spec 10)."""
    if inputs.teacher_hidden is None or inputs.teacher_head is None:
        raise ConfigError("loss: logits needs a teacher; give one or use label")
    return qk.distillation_loss(
        inputs.student_hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        valid=inputs.valid,
        chunk_size=inputs.chunk_size,
    )


def _chunk_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Summed fp32 cross entropy of one chunk: hidden [C, H], head [V, H], labels [C]."""
    logits = F.linear(hidden, head).to(torch.float32)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")


def _label(inputs: LossInputs) -> Tensor:
    """Next-token cross entropy, mean over the tokens that have a valid label."""
    labels = inputs.labels
    if inputs.valid is not None:
        labels = labels.masked_fill(~inputs.valid, IGNORED_LABEL)
    labels = labels[:, 1:].reshape(-1)
    hidden = inputs.student_hidden[:, :-1]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    total = hidden.new_zeros((), dtype=torch.float32)
    # The operands are in their final dtype already: autocast would only convert them back and
    # forth.
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, labels.numel(), inputs.chunk_size):
            rows = slice(begin, begin + inputs.chunk_size)
            # Recomputed in backward: otherwise the logits of every chunk would be kept until then.
            total = total + checkpoint(
                _chunk_cross_entropy,
                hidden[rows],
                inputs.student_head,
                labels[rows],
                use_reentrant=False,
            )
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def _label_and_logits(inputs: LossInputs) -> Tensor:
    """The sum of both, weights 1 (the paper gives none)."""
    return _label(inputs) + _logits(inputs)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("logits", _logits, needs_teacher=True),
        Loss("label", _label, needs_teacher=False),
        Loss("label+logits", _label_and_logits, needs_teacher=True),
    )
}
"""Every loss of the trainer by its name on the command line."""


def find_loss(name: str) -> Loss:
    """The loss called `name`; ConfigError lists the known ones."""
    if name not in LOSSES:
        raise ConfigError(f"loss: {name!r} is unknown; use one of {', '.join(LOSSES)}")
    return LOSSES[name]
