"""Soft cross entropy between teacher and student, chunked over tokens: spec 10."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SoftCrossEntropy = Callable[[Tensor, Tensor, "Tensor | None", float], Tensor]


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None, inv_n: float
) -> Tensor:
    """Loss of a chunk, fp32 []; ``student_logits`` fp32 [C, V] becomes its own gradient (spec 10).

    ``teacher_logits`` fp32 [C, V], ``valid`` bool [C] or None, ``inv_n`` the weight of a token.
    """
    student = torch.log_softmax(student_logits, dim=-1)
    teacher = torch.softmax(teacher_logits, dim=-1)
    # Not teacher * student: a padded vocabulary entry is 0 * -inf on both sides. And not where
    # teacher > 0: NaN has to show.
    terms = torch.where(teacher == 0, torch.zeros_like(student), teacher * student)
    losses = -terms.sum(dim=-1) * inv_n
    gradient = (torch.exp(student) - teacher) * inv_n
    if valid is not None:
        losses = torch.where(valid, losses, torch.zeros_like(losses))
        gradient = torch.where(valid.unsqueeze(-1), gradient, torch.zeros_like(gradient))
    student_logits.copy_(gradient)
    return losses.sum()


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
    chunk_loss: SoftCrossEntropy = soft_cross_entropy,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss fp32 [], grad_student_hidden [n, K], grad_student_head [V, K]) (spec 10).

    student_hidden [n, K], student_head [V, K], teacher_hidden [n, K'], teacher_head [V, K'];
    ``valid`` bool [n] or None. The loss is the mean over valid tokens (0 if none). Only
    [chunk_size, V] logits exist at a time. ``chunk_loss`` is the pass over one chunk of logits; a
    backend may bring a fused one.
    """
    tokens = student_hidden.shape[0]
    count = tokens if valid is None else int(valid.sum())
    loss = student_hidden.new_zeros((), dtype=torch.float32)
    grad_hidden = torch.zeros_like(student_hidden)
    grad_head = torch.zeros_like(student_head, dtype=torch.float32)
    for start in range(0, tokens if count else 0, chunk_size):
        rows = slice(start, min(start + chunk_size, tokens))
        hidden = student_hidden[rows]
        logits = (hidden @ student_head.T).to(torch.float32)
        teacher_logits = (teacher_hidden[rows] @ teacher_head.T).to(torch.float32)
        loss += chunk_loss(
            logits, teacher_logits, None if valid is None else valid[rows], 1.0 / count
        )
        gradient = logits.to(student_hidden.dtype)
        grad_hidden[rows] = gradient @ student_head
        grad_head += (gradient.T @ hidden).to(torch.float32)
    return loss, grad_hidden, grad_head.to(student_head.dtype)


def distillation_loss_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
    chunk_loss: SoftCrossEntropy = soft_cross_entropy,
) -> tuple[Tensor, Tensor]:
    """(loss fp32 [], grad [n, V] in the student's dtype) of logits that exist already (spec 10)."""
    tokens = student_logits.shape[0]
    count = tokens if valid is None else int(valid.sum())
    loss = student_logits.new_zeros((), dtype=torch.float32)
    grad = torch.zeros_like(student_logits, memory_format=torch.contiguous_format)
    for start in range(0, tokens if count else 0, chunk_size):
        rows = slice(start, min(start + chunk_size, tokens))
        logits = student_logits[rows].to(torch.float32, copy=True)
        loss += chunk_loss(
            logits,
            teacher_logits[rows].to(torch.float32),
            None if valid is None else valid[rows],
            1.0 / count,
        )
        grad[rows] = logits.to(grad.dtype)
    return loss, grad


def distillation_loss_top_k(
    student_hidden: Tensor,
    student_head: Tensor,
    probabilities: Tensor,
    tokens: Tensor,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, grad_student_hidden, grad_student_head) against stored probabilities (spec 10).

    ``probabilities`` float [n, k] of the vocabulary entries ``tokens`` int64 [n, k], which are
    distinct in a row where the probability is not 0; every other entry has probability 0. Rows need
    not sum to 1. A token outside the vocabulary is nothing with probability 0, else NaN.
    """
    rows_total = student_hidden.shape[0]
    count = rows_total if valid is None else int(valid.sum())
    loss = student_hidden.new_zeros((), dtype=torch.float32)
    grad_hidden = torch.zeros_like(student_hidden)
    grad_head = torch.zeros_like(student_head, dtype=torch.float32)
    for start in range(0, rows_total if count else 0, chunk_size):
        rows = slice(start, min(start + chunk_size, rows_total))
        hidden = student_hidden[rows]
        student = torch.log_softmax((hidden @ student_head.T).to(torch.float32), dim=-1)
        p = probabilities[rows].to(torch.float32)
        inside = (tokens[rows] >= 0) & (tokens[rows] < student.shape[-1])
        p = torch.where(inside | (p == 0), p, torch.full_like(p, torch.nan))
        places = torch.where(inside, tokens[rows], torch.zeros_like(tokens[rows]))
        picked = student.gather(-1, places)
        losses = -torch.where(p == 0, torch.zeros_like(p), p * picked).sum(-1)
        gradient = torch.exp(student) * p.sum(-1, keepdim=True)
        gradient.scatter_add_(-1, places, -p)
        if valid is not None:
            losses = torch.where(valid[rows], losses, torch.zeros_like(losses))
            gradient = torch.where(valid[rows].unsqueeze(-1), gradient, torch.zeros_like(gradient))
        loss += losses.sum() / count
        scaled = (gradient / count).to(student_hidden.dtype)
        grad_hidden[rows] = scaled @ student_head
        grad_head += (scaled.T @ hidden).to(torch.float32)
    return loss, grad_hidden, grad_head.to(student_head.dtype)
