"""What follows the last hidden state: the distillation loss and sampling (spec 10, 15, 16)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import autocast_input
from ..checks import FLOAT_DTYPES, check_same_device, check_shape, check_tensor
from ..errors import InvalidArgument, InvalidArgumentType

ops = torch.ops.llmqat


def default_chunk_size(tokens: int) -> int:
    """Tokens whose logits exist at one time, of so many: at most a quarter of them from 1024 on, so
    that the logits stay a small part of what plain torch holds, and enough for the products to run
    at full speed.
    """
    return 1024 if tokens >= 4096 else 512 if tokens >= 2048 else 256


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    valid: Tensor | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Soft cross entropy of teacher against student logits, [tokens, vocab] never stored (spec 10;
    LLM-QAT Eq. 4).

    Args:
        student_hidden: float [..., H] before the head; teacher_hidden: float [..., H'], same
            tokens.
        student_head, teacher_head: [V, H], [V, H'].
        valid: bool [...] of tokens that count, or None for all.
        chunk_size: tokens whose logits exist at one time; None: :func:`default_chunk_size`.
        vocab_size: only the first rows of both heads, where they are padded; None for all.

    Under autocast hidden states and heads are cast as a linear's would be. A student that is
    trained in fp16 is computed in fp32, since fp16 would flush gradients that carry 1/n and no loss
    scale yet; bf16 is faster.

    Returns:
        fp32 scalar, mean over valid tokens; differentiable in the student's hidden states and head.
    """
    check_tensor("student_hidden", student_hidden, FLOAT_DTYPES, 2)
    check_tensor("teacher_hidden", teacher_hidden, FLOAT_DTYPES, 2)
    check_tensor("student_head", student_head, FLOAT_DTYPES, 2)
    check_tensor("teacher_head", teacher_head, FLOAT_DTYPES, 2)
    student_hidden, student_head = _student(student_hidden, student_head)
    teacher_hidden, teacher_head = autocast_input(teacher_hidden), autocast_input(teacher_head)
    tokens = tuple(student_hidden.shape[:-1])
    if tuple(teacher_hidden.shape[:-1]) != tokens:
        raise InvalidArgument(
            f"teacher_hidden: expected tokens {tokens}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    student_head = _real_rows("student_head", student_head, vocab_size)
    teacher_head = _real_rows("teacher_head", teacher_head, vocab_size)
    vocab = student_head.shape[0]
    _check_head("student", student_head, student_hidden, vocab)
    _check_head("teacher", teacher_head, teacher_hidden, vocab)
    valid = _flat_valid(valid, tokens)
    chunk = _chunk_size(chunk_size, student_hidden)
    check_same_device(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        valid=valid,
    )
    loss, _, _ = ops.distillation_loss(
        _valid_rows(student_hidden, valid),
        student_head,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head.detach(),
        valid,
        chunk,
    )
    return loss


def _student(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and head as they are computed with: trained in fp16, in fp32. The backward of
    that cast applies the loss scale before it rounds to fp16.
    """
    hidden, head = autocast_input(hidden), autocast_input(head)
    trained = hidden.requires_grad or head.requires_grad
    if trained and torch.float16 == hidden.dtype == head.dtype:
        return hidden.float(), head.float()
    return hidden, head


def _real_rows(name: str, head: Tensor, vocab_size: int | None) -> Tensor:
    if vocab_size is None:
        return head
    if not 1 <= vocab_size <= head.shape[0]:
        raise InvalidArgument(
            f"vocab_size: {vocab_size} must be 1..{head.shape[0]}, the rows of {name}"
        )
    return head[:vocab_size]


def _check_head(who: str, head: Tensor, hidden: Tensor, vocab: int) -> None:
    """``head`` must be [vocab, H] for ``hidden`` [..., H], in one dtype and not empty."""
    check_shape(f"{who}_head", head, (vocab, hidden.shape[-1]))
    if vocab == 0:
        raise InvalidArgument(f"{who}_head: the vocabulary is empty")
    if head.dtype != hidden.dtype:
        raise InvalidArgumentType(
            f"{who}_head: dtype {head.dtype} is not {who}_hidden's {hidden.dtype}; cast one of them"
        )


def _valid_rows(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """``hidden`` as [tokens, H], with zeros in the rows that do not count.

    Their gradient is 0, but 0 * NaN would reach the head's: a fully masked attention row may leave
    NaN in a padded token.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if valid is None else rows.masked_fill(~valid.unsqueeze(-1), 0.0)


def _flat_valid(valid: Tensor | None, tokens: tuple[int, ...]) -> Tensor | None:
    if valid is None:
        return None
    check_tensor("valid", valid, (torch.bool,))
    check_shape("valid", valid, tokens)
    return valid.reshape(-1)


def _chunk_size(chunk_size: int | None, hidden: Tensor) -> int:
    """The chunk size for ``hidden`` [..., H] (or logits)."""
    if chunk_size is None:
        return default_chunk_size(hidden.shape[:-1].numel())
    if chunk_size < 1:
        raise InvalidArgument(f"chunk_size: {chunk_size} must be at least 1")
    return chunk_size


def distillation_loss_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """:func:`distillation_loss` of logits that exist already (spec 10).

    Args:
        student_logits, teacher_logits: float [..., V], same tokens.
        valid: bool [...] of tokens that count, or None for all.
        chunk_size: tokens whose fp32 logits exist at one time; None:
            :func:`default_chunk_size`.
        vocab_size: only the first columns of both, where they are padded; None for all.

    Returns:
        fp32 scalar, mean over valid tokens; differentiable in the student's logits.
    """
    check_tensor("student_logits", student_logits, FLOAT_DTYPES, 2)
    check_tensor("teacher_logits", teacher_logits, FLOAT_DTYPES, 2)
    if student_logits.dtype == torch.float16 and student_logits.requires_grad:
        student_logits = student_logits.float()  # as in distillation_loss
    student_logits = _real_columns("student_logits", student_logits, vocab_size)
    teacher_logits = _real_columns("teacher_logits", teacher_logits, vocab_size)
    check_shape("teacher_logits", teacher_logits, tuple(student_logits.shape))
    if student_logits.shape[-1] == 0:
        raise InvalidArgument("student_logits: the vocabulary is empty")
    valid = _flat_valid(valid, tuple(student_logits.shape[:-1]))
    chunk = _chunk_size(chunk_size, student_logits)
    check_same_device(student_logits=student_logits, teacher_logits=teacher_logits, valid=valid)
    vocab = student_logits.shape[-1]
    loss, _ = ops.distillation_loss_logits(
        student_logits.reshape(-1, vocab),
        teacher_logits.detach().reshape(-1, vocab),
        valid,
        chunk,
    )
    return loss


def _real_columns(name: str, logits: Tensor, vocab_size: int | None) -> Tensor:
    if vocab_size is None:
        return logits
    if not 1 <= vocab_size <= logits.shape[-1]:
        raise InvalidArgument(
            f"vocab_size: {vocab_size} must be 1..{logits.shape[-1]}, the columns of {name}"
        )
    return logits[..., :vocab_size]


def distillation_loss_top_k(
    student_hidden: Tensor,
    student_head: Tensor,
    probabilities: Tensor,
    tokens: Tensor,
    *,
    valid: Tensor | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """:func:`distillation_loss` against stored teacher probabilities, with no teacher (spec 10).

    Args:
        student_hidden: float [..., H]. student_head: [V, H].
        probabilities: float [..., k] of the entries ``tokens`` int64 [..., k], distinct in a row
            where the probability is not 0; all others count as 0, and a row need not sum to 1. With
            probability 0 any number may stand for a token; with another, one outside the vocabulary
            makes the loss NaN.
        valid, chunk_size, vocab_size: as in :func:`distillation_loss`.

    Returns:
        fp32 scalar, mean over valid tokens; differentiable in the student's hidden states and head.
    """
    check_tensor("student_hidden", student_hidden, FLOAT_DTYPES, 2)
    check_tensor("student_head", student_head, FLOAT_DTYPES, 2)
    check_tensor("probabilities", probabilities, FLOAT_DTYPES, 2)
    check_tensor("tokens", tokens, (torch.int64,), 2)
    student_hidden, student_head = _student(student_hidden, student_head)
    student_head = _real_rows("student_head", student_head, vocab_size)
    rows = tuple(student_hidden.shape[:-1])
    k, vocab = probabilities.shape[-1], student_head.shape[0]
    if not 1 <= k <= vocab:
        raise InvalidArgument(f"probabilities: {k} a token must be 1..{vocab}, the vocabulary")
    _check_head("student", student_head, student_hidden, vocab)
    check_shape("probabilities", probabilities, (*rows, k))
    check_shape("tokens", tokens, (*rows, k))
    valid = _flat_valid(valid, rows)
    chunk = _chunk_size(chunk_size, student_hidden)
    check_same_device(
        student_hidden=student_hidden,
        student_head=student_head,
        probabilities=probabilities,
        tokens=tokens,
        valid=valid,
    )
    loss, _, _ = ops.distillation_loss_top_k(
        _valid_rows(student_hidden, valid),
        student_head,
        probabilities.detach().reshape(-1, k),
        tokens.reshape(-1, k),
        valid,
        chunk,
    )
    return loss


def sample(
    logits: Tensor,
    record: Tensor,
    step: Tensor,
    *,
    seed: int,
    greedy: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """One token per row by Gumbel-max with counter-based noise (spec 15, 16).

    Args:
        logits: float [n, V]. record, step: int64 [n]: with ``seed`` they alone decide the noise,
            so the result does not depend on batching or order.
        greedy: bool [n], rows that take the largest logit instead; None samples all.
        seed: any int64. temperature: > 0, a normal fp32 number.
        top_k: 0 samples from the full softmax.

    Returns:
        int64 [n]; -1 for a row with NaN or no finite logit.
    """
    check_tensor("logits", logits, FLOAT_DTYPES, 2)
    n = logits.shape[0]
    check_tensor("record", record, (torch.int64,))
    check_tensor("step", step, (torch.int64,))
    check_shape("record", record, (n,))
    check_shape("step", step, (n,))
    if greedy is None:
        greedy = torch.zeros(n, dtype=torch.bool, device=logits.device)
    check_tensor("greedy", greedy, (torch.bool,))
    check_shape("greedy", greedy, (n,))
    _check_temperature(temperature)
    if top_k < 0:
        raise InvalidArgument(f"top_k: {top_k} must be 0 (off) or positive")
    _check_seed(seed)
    return ops.sample(logits, record, step, greedy, seed, temperature, top_k)


def _check_temperature(temperature: float) -> None:
    """The logits are divided by its fp32 value, which must be neither 0 nor infinite."""
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not temperature > 0:
        raise InvalidArgument(
            f"temperature: {temperature} must be positive; use greedy for the largest logit"
        )
    if not smallest <= temperature <= largest:
        raise InvalidArgument(
            f"temperature: {temperature} is not a normal fp32 number; use {smallest:.2g} to"
            f" {largest:.2g}"
        )


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidArgumentType(f"seed: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise InvalidArgument(f"seed: {seed} does not fit into int64; use -2^63 to 2^63 - 1")
