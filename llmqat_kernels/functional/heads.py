"""What follows the last hidden state: the distillation loss and sampling (spec 10, 15, 16)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_same_device, check_shape, check_tensor
from ..errors import InvalidArgument, InvalidArgumentType

ops = torch.ops.llmqat


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Soft cross entropy of teacher against student logits, [tokens, vocab] never stored (spec 10;
    LLM-QAT Eq. 4).

    Args:
        student_hidden: float [..., H] before the head; teacher_hidden: float [..., H'], same
            tokens.
        student_head, teacher_head: [V, H], [V, H'].
        valid: bool [...] of tokens that count, or None for all.
        chunk_size: tokens whose logits exist at one time.

    Returns:
        fp32 scalar, mean over valid tokens; differentiable in the student's hidden states and head.
    """
    check_tensor("student_hidden", student_hidden, FLOAT_DTYPES, 2)
    check_tensor("teacher_hidden", teacher_hidden, FLOAT_DTYPES, 2)
    check_tensor("student_head", student_head, FLOAT_DTYPES, 2)
    check_tensor("teacher_head", teacher_head, FLOAT_DTYPES, 2)
    tokens = tuple(student_hidden.shape[:-1])
    if tuple(teacher_hidden.shape[:-1]) != tokens:
        raise InvalidArgument(
            f"teacher_hidden: expected tokens {tokens}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    vocab = student_head.shape[0]
    check_shape("student_head", student_head, (vocab, student_hidden.shape[-1]))
    check_shape("teacher_head", teacher_head, (vocab, teacher_hidden.shape[-1]))
    if valid is not None:
        check_tensor("valid", valid, (torch.bool,))
        check_shape("valid", valid, tokens)
        valid = valid.reshape(-1)
    if chunk_size < 1:
        raise InvalidArgument(f"chunk_size: {chunk_size} must be at least 1")
    check_same_device(
        student_hidden=student_hidden, teacher_hidden=teacher_hidden, student_head=student_head
    )
    loss, _, _ = ops.distillation_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head.detach(),
        valid,
        chunk_size,
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
            so the
            result does not depend on batching or order.
        greedy: bool [n], rows that take the largest logit instead; None samples all.
        temperature: > 0. top_k: 0 samples from the full softmax.

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
    if not temperature > 0:
        raise InvalidArgument(
            f"temperature: {temperature} must be positive; use greedy for the largest logit"
        )
    if top_k < 0:
        raise InvalidArgument(f"top_k: {top_k} must be 0 (off) or positive")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidArgumentType(f"seed: expected an int, got {type(seed).__name__}")
    return ops.sample(logits, record, step, greedy, seed, temperature, top_k)
