"""Training losses by name: what the student is pulled towards (LLM-QAT Eq. 4 and table 5).

A loss is a weighted sum of terms. A term reads a `LossInputs`: hidden states before the heads,
never whole logits; it walks over chunks of tokens, so [tokens, vocab] exists for one chunk at a
time. The terms between decoder blocks are in `block_losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import llmqat_kernels as qk
from llmqat.errors import ConfigError
from llmqat.train.block_losses import attention_divergence, hidden_distance
from llmqat.train.observe import BlockState
from llmqat_kernels.functional.heads import default_chunk_size

__all__ = ["IGNORED_LABEL", "TERMS", "Loss", "LossInputs", "Term", "find_loss", "parse_weights"]

IGNORED_LABEL = -100
"""The label of a token that is not predicted, as everywhere in torch and transformers."""


@dataclass(frozen=True)
class LossInputs:
    """What a loss may read. B sequences of T tokens, vocabulary V.

    Attributes:
        student_hidden: float [B, T, H], the output of the last norm.
        student_head: float [V, H], same dtype.
        teacher_hidden: float [B, T, H'] or None where no teacher is loaded.
        teacher_head: float [V, H'] or None.
        labels: int64 [B, T], token t is predicted at t - 1; `IGNORED_LABEL` is skipped.
        valid: bool [B, T] of tokens that count, or None for all.
        chunk_size: tokens whose logits exist at one time; None: `default_chunk_size` of them.
        saved: the stored teacher instead of a loaded one: its largest probabilities, float
            [B, T, k], and their tokens, int64 [B, T, k]; or None.
        student_blocks, teacher_blocks: what the compared decoder blocks computed; empty where no
            term asks.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    labels: Tensor
    valid: Tensor | None = None
    chunk_size: int | None = None
    saved: tuple[Tensor, Tensor] | None = None
    student_blocks: Sequence[BlockState] = ()
    teacher_blocks: Sequence[BlockState] = ()


@dataclass(frozen=True)
class Term:
    """One part of a loss: `compute(inputs)` is an fp32 scalar, a mean over valid tokens.

    Attributes:
        needs_teacher: not computable from labels alone.
        watches: the field of `BlockState` that it compares, "hidden" or "query", or "".
    """

    name: str
    compute: Callable[[LossInputs], Tensor]
    needs_teacher: bool
    watches: str = ""


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms, which stand in the order of `TERMS`: its bits do not depend on how
    the sum was written.
    """

    terms: tuple[Term, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """The sum as it is written on the command line."""
        return "+".join(term.name for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term needs a teacher, loaded or saved."""
        return any(term.needs_teacher for term in self.terms)

    def watches(self, field: str = "") -> bool:
        """Whether a term compares `field` of decoder blocks (any field by default)."""
        return any(term.watches and field in ("", term.watches) for term in self.terms)

    def compute(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, fp32 [], and every term by name, unweighted and detached."""
        total = None
        parts = {}
        for term, weight in zip(self.terms, self.weights, strict=True):
            part = term.compute(inputs)
            parts[term.name] = part.detach()
            weighted = part if weight == 1 else weight * part
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, parts


def _logits(inputs: LossInputs) -> Tensor:
    """Cross entropy of teacher against student probabilities, temperature 1 (Eq. 4, spec 10)."""
    if inputs.saved is not None:
        probabilities, tokens = inputs.saved
        return qk.distillation_loss_top_k(
            inputs.student_hidden,
            inputs.student_head,
            probabilities,
            tokens,
            valid=inputs.valid,
            chunk_size=inputs.chunk_size,
        )
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
    chunk = inputs.chunk_size or default_chunk_size(labels.numel())
    # The operands are in their final dtype already: autocast would only convert them back and
    # forth.
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, labels.numel(), chunk):
            rows = slice(begin, begin + chunk)
            # Recomputed in backward: otherwise the logits of every chunk would be kept until then.
            total = total + checkpoint(
                _chunk_cross_entropy,
                hidden[rows],
                inputs.student_head,
                labels[rows],
                use_reentrant=False,
            )
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def _hidden(inputs: LossInputs) -> Tensor:
    """Mean squared error of the decoder blocks' outputs."""
    _check_blocks("hidden", inputs)
    return hidden_distance(inputs.student_blocks, inputs.teacher_blocks, inputs.valid)


def _attention(inputs: LossInputs) -> Tensor:
    """KL divergence of the decoder blocks' attention probabilities."""
    _check_blocks("attention", inputs)
    return attention_divergence(inputs.student_blocks, inputs.teacher_blocks, inputs.valid)


def _check_blocks(name: str, inputs: LossInputs) -> None:
    if not inputs.student_blocks or len(inputs.student_blocks) != len(inputs.teacher_blocks):
        raise ConfigError(
            f"loss: {name} needs the same blocks of student and teacher; give a teacher with as"
            " many, or choose blocks with --loss-layers"
        )


TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term("label", _label, needs_teacher=False),
        Term("logits", _logits, needs_teacher=True),
        Term("hidden", _hidden, needs_teacher=True, watches="hidden"),
        Term("attention", _attention, needs_teacher=True, watches="query"),
    )
}
"""Every term of a loss by its name on the command line."""


def find_loss(name: str, weights: Sequence[float] | None = None) -> Loss:
    """The loss `name`: terms of `TERMS` joined by "+", in any order.

    Args:
        weights: one positive number for each term, in the order of `name`; None for 1 each (the
            paper gives none).

    Raises:
        ConfigError: an unknown or repeated term, or weights that do not fit.
    """
    names = name.split("+")
    for term in names:
        if term not in TERMS:
            raise ConfigError(
                f"loss: {term!r} is unknown; use {', '.join(TERMS)} or a sum such as label+logits"
            )
        if names.count(term) > 1:
            raise ConfigError(f"loss: {name!r} has {term} twice; give it a weight instead")
    if weights is None:
        weights = [1.0] * len(names)
    if len(weights) != len(names):
        raise ConfigError(
            f"loss_weights: {len(weights)} given for the {len(names)} terms of {name}; one each"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(
            f"loss_weights: {list(weights)} must be positive; leave a term out of the loss instead"
        )
    chosen = dict(zip(names, map(float, weights), strict=True))
    ordered = [term for term in TERMS if term in chosen]
    return Loss(
        tuple(TERMS[term] for term in ordered),
        tuple(chosen[term] for term in ordered),
    )


def parse_weights(text: str | None) -> list[float] | None:
    """ "1,1,10" as numbers; None stays None. ConfigError for anything else."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--loss-weights: {text!r} is not supported; use numbers such as 1,1,10"
        ) from error
