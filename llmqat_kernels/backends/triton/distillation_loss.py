"""Distillation loss: a chunk's logits by cuBLAS, which one kernel replaces by their gradient.

Math:     spec 10. A chunk: logits of student and teacher, soft_cross_entropy.py, two products.
Shapes:   hidden [n, K] and heads [V, K], or logits [n, V]; the teacher may be k entries a row.
Dtypes:   fp32, fp16, bf16, teacher and student apart; softmax in fp32, logits in hidden's dtype.
Cost:     8nKV operations, and 10 bytes a logit: about 5 % of their time at K = 4096 (by count).
          Peak memory of n = 8192, K = 4096, V = 128,256 in bf16, chunk 1024: 2 x 0.263 GB logits
          + 1.05 GB gradient of the head (an output) + 0.07 GB of the hidden states = 1.64 GB, where
          plain torch holds four fp32 [n, V] = 16.8 GB: 9.8 %. Beyond ROUNDED_CHUNKS an fp32 sum of
          the head's gradient adds 4VK bytes (2.1 GB). Chunks follow the tokens: at most 7.3 % from
          1024 tokens on (docs/spec.md 10), beside the same gradients.
Numerics: not exact: 2x (loss), 3x (gradients) of plain torch's error. The same bits every run.
          Nothing is read back to the host: the count of valid tokens stays on the device.
Edges:    no tokens or none valid: zeros. A stored token outside the vocabulary makes the loss NaN.
Limits:   both gradients are always computed: the operator cannot see which one is wanted.
          fp16 flushes gradients below 3e-8 (they carry 1/n before any loss scale); the functional
          form therefore trains fp16 students in fp32.
Tests:    tests/kernels/test_distillation_forms.py, tests/triton/test_distillation_loss.py
Bench:    python -m benchmarks.run --op distillation_loss --device cuda
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import ALIGNMENT, TRITON_TYPES, Variant, empty, launch, rows_near, unaligned
from .soft_cross_entropy import (
    ENTRY_BLOCKS,
    MOST_OF_SHORT_ROW,
    SHORT_ROW,
    entries_block,
    loss_tile,
    soft_cross_entropy_kernel,
    top_k_cross_entropy_kernel,
    top_k_tile,
)

ROUNDED_CHUNKS = 8
"""Up to so many chunks are summed in the dtype of the head, one rounding each: 1.5 times the error
of a sum in fp32, and 4VK bytes less. More of them are summed in fp32."""
ALIGNED = 64
"""Row length of the logits' buffer is a multiple of it: 16-byte loads for any vocabulary."""


def _tokens_that_count(
    valid: Tensor | None, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """valid bool [tokens], and fp32 [] 1 / their number (0 if there is none), on the device."""
    if valid is None:
        valid = torch.ones((tokens,), dtype=torch.bool, device=device)
    count = valid.sum().to(torch.float32)
    return valid.contiguous(), torch.where(count > 0, count.reciprocal(), 0.0)


class _HeadGradient:
    """The sum over chunks of gradient^T @ hidden: [V, K] in the dtype of the head."""

    def __init__(self, head: Tensor, chunks: int) -> None:
        self.head = head
        wide = chunks > ROUNDED_CHUNKS
        dtype = torch.float32 if wide else head.dtype
        self.total = empty(tuple(head.shape), dtype, head.device)
        if chunks == 0 or wide:
            self.total.zero_()
        self.started = chunks == 0 or wide

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """One chunk: gradient [C, V], hidden [C, K]."""
        transposed = gradient.T
        if not self.started:
            torch.mm(transposed, hidden, out=self.total)
        elif self.total.dtype == gradient.dtype:
            self.total.addmm_(transposed, hidden)
        elif gradient.is_cuda:
            torch.addmm(self.total, transposed, hidden, out_dtype=self.total.dtype, out=self.total)
        else:  # the interpreter: torch has this product on CUDA only
            self.total.add_(transposed @ hidden)
        self.started = True

    def result(self) -> Tensor:
        return self.total.to(self.head.dtype)


def _through_head(
    hidden: Tensor, head: Tensor, chunk_size: int, into_gradient: Callable[[slice, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and head; ``into_gradient(rows, logits)`` replaces a chunk's logits."""
    n, vocabulary = hidden.shape[0], head.shape[0]
    chunks = triton.cdiv(n, chunk_size)
    grad_hidden = empty(tuple(hidden.shape), hidden.dtype, hidden.device)
    grad_head = _HeadGradient(head, chunks)
    buffer = _logits_buffer(min(n, chunk_size), vocabulary, hidden)
    for start in range(0, n, chunk_size):
        rows = slice(start, min(start + chunk_size, n))
        logits = buffer[: rows.stop - start, :vocabulary]
        torch.mm(hidden[rows], head.T, out=logits)
        into_gradient(rows, logits)
        torch.mm(logits, head, out=grad_hidden[rows])
        grad_head.add(logits, hidden[rows])
    del buffer  # before the sum gets a copy in the head's dtype
    return grad_hidden, grad_head.result()


def _logits_buffer(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    width = triton.cdiv(vocabulary, ALIGNED) * ALIGNED
    return empty((rows, width), like.dtype, like.device)


def _soft_cross_entropy(
    student: Tensor, teacher: Tensor, gradient: Tensor, valid: Tensor,
    inverse_count: Tensor, losses: Tensor, width: int,
) -> None:  # fmt: skip
    rows, columns = student.shape
    strides = (student.stride(0), teacher.stride(0), gradient.stride(0), width)
    places = (x.data_ptr() for x in (student, teacher, gradient))
    regular = all(place % ALIGNMENT == 0 for place in (*strides, *places))
    # Logits that are loaded one by one take more registers than a lane of the long rows' tile has.
    tile = loss_tile(columns if regular else SHORT_ROW, max(student.itemsize, teacher.itemsize))
    launch(
        soft_cross_entropy_kernel, (rows,), student, teacher, gradient, valid, inverse_count,
        losses, columns, width, student.stride(0), teacher.stride(0), gradient.stride(0),
        **tile.constants, num_warps=tile.num_warps, regular=regular,
    )  # fmt: skip


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec 10."""
    n, vocabulary = student_hidden.shape[0], student_head.shape[0]
    valid, inverse = _tokens_that_count(valid, n, student_hidden.device)
    losses = empty((n,), torch.float32, student_hidden.device)
    buffer = _logits_buffer(min(n, chunk_size), vocabulary, teacher_hidden)

    def into_gradient(rows: slice, logits: Tensor) -> None:
        teacher = buffer[: rows.stop - rows.start, :vocabulary]
        torch.mm(teacher_hidden[rows], teacher_head.T, out=teacher)
        _soft_cross_entropy(
            logits, teacher, logits, valid[rows], inverse, losses[rows], buffer.shape[1]
        )

    gradients = _through_head(student_hidden, student_head, chunk_size, into_gradient)
    return losses.sum() * inverse, *gradients


def distillation_loss_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """See spec 10. ``chunk_size`` is not needed: nothing but the gradient is stored."""
    n, columns = student_logits.shape
    student, teacher = (rows_near(x) for x in (student_logits, teacher_logits))
    valid, inverse = _tokens_that_count(valid, n, student.device)
    losses = empty((n,), torch.float32, student.device)
    gradient = empty((n, columns), student.dtype, student.device)
    _soft_cross_entropy(student, teacher, gradient, valid, inverse, losses, columns)
    return losses.sum() * inverse, gradient


def distillation_loss_top_k(
    student_hidden: Tensor,
    student_head: Tensor,
    probabilities: Tensor,
    tokens: Tensor,
    valid: Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec 10. Entries of probability 0 may repeat a token; the others of a row may not."""
    n, k = probabilities.shape
    valid, inverse = _tokens_that_count(valid, n, student_hidden.device)
    losses = empty((n,), torch.float32, student_hidden.device)
    probabilities, tokens = probabilities.to(torch.float32).contiguous(), tokens.contiguous()
    tile = top_k_tile(student_head.shape[0], student_hidden.itemsize, k)

    def into_gradient(rows: slice, logits: Tensor) -> None:
        launch(
            top_k_cross_entropy_kernel, (logits.shape[0],), logits, probabilities[rows],
            tokens[rows], valid[rows], inverse, losses[rows],
            logits.shape[1], logits.stride(0), logits.stride(0), k,
            **tile.constants, ENTRIES=entries_block(k), num_warps=tile.num_warps,
        )  # fmt: skip

    gradients = _through_head(student_hidden, student_head, chunk_size, into_gradient)
    return losses.sum() * inverse, *gradients


KERNELS: dict[str, Any] = {
    "distillation_loss": distillation_loss,
    "distillation_loss_logits": distillation_loss_logits,
    "distillation_loss_top_k": distillation_loss_top_k,
}


_RESULTS = {"valid": "*u1", "inverse_count": "*fp32", "losses": "*fp32"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _soft_variant(columns: int, student: torch.dtype, teacher: torch.dtype) -> Variant:
    tile = loss_tile(columns, max(student.itemsize, teacher.itemsize))
    name, other = TRITON_TYPES[student], TRITON_TYPES[teacher]
    sizes = ("columns", "width", "student_stride", "teacher_stride", "gradient_stride")
    tensors = {"student": f"*{name}", "teacher": f"*{other}", "gradient": f"*{name}"}
    return Variant(
        f"soft_cross_entropy {name}, teacher {other} V={columns}",
        soft_cross_entropy_kernel,
        {**tensors, **_RESULTS, **dict.fromkeys(sizes, "i32")},
        tile.constants,
        num_warps=tile.num_warps,
        promises=frozenset({"vector_loads"}),
    )


def _top_k_variant(columns: int, dtype: torch.dtype, entries: int) -> Variant:
    tile = top_k_tile(columns, dtype.itemsize, entries)
    sizes = ("columns", "width", "student_stride", "k")
    tensors = {"student": f"*{TRITON_TYPES[dtype]}", "probabilities": "*fp32", "tokens": "*i64"}
    return Variant(
        f"top_k_cross_entropy {TRITON_TYPES[dtype]} V={columns} k={entries}",
        top_k_cross_entropy_kernel,
        {**tensors, **_RESULTS, **dict.fromkeys(sizes, "i32")},
        {**tile.constants, "ENTRIES": entries},
        num_warps=tile.num_warps,
        promises=frozenset({"vector_loads"}),
    )


def variants(arch: int) -> Iterator[Variant]:
    """Every pair of dtypes and block of entries, at a short and at a long row."""
    for columns in (SHORT_ROW, 32_000):
        for dtype in _DTYPES:
            for teacher in _DTYPES:
                form = _soft_variant(columns, dtype, teacher)
                yield form
                if columns == SHORT_ROW:
                    yield unaligned(form)
            for entries in ENTRY_BLOCKS:
                if columns > SHORT_ROW or entries <= MOST_OF_SHORT_ROW:
                    yield _top_k_variant(columns, dtype, entries)
