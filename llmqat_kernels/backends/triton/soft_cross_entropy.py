"""Rows of the distillation loss: logits in, loss out, and the logits become their gradient.

Math:     spec 10. First pass: maximum and sum of e^(x - maximum), rescaled as the maximum grows.
          Second pass: loss and gradient, the last block first, since that is still in L2.
Shapes:   a row of V logits and one of teacher logits, or k of its probabilities; one program a row.
Dtypes:   fp32, fp16, bf16, teacher and student apart; arithmetic in fp32.
Tiling:   512 lanes of 16 bytes. A lane reduces its 16 bytes before it touches its running sum, so
          a logit costs one exponential a pass, and every load and store is 16 bytes.
Cost:     10 bytes a logit of bf16 (6 with k probabilities) and 48 instructions (SASS, sm_90): bound
          by memory, 32 registers, so 64 warps an SM.
Numerics: tl.exp (ex2.approx, 2 ulp, no flush to zero): not exact, spec 10 is not either. No
          atomics: the same bits every run.
Edges:    rows that are not valid are not read, only cleared. NaN or +inf in a row, or a row of
          -inf: NaN. Probability 0 adds nothing. ``width`` >= V elements of a row may be read and
          overwritten: with a multiple of 16 the accesses stay wide for any V.
Tests:    tests/triton/test_distillation_loss.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ...errors import InvalidArgument
from . import numerics

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The maximum before the first value: finite, so that -inf - maximum is no NaN."""
SHORT_ROW = 2048
ENTRY_BLOCKS = (128, 1024, 8192)
MOST_OF_SHORT_ROW = ENTRY_BLOCKS[1]
"""Stored probabilities that the lanes of a short row hold."""


@triton.jit
def _columns(start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a block: [LANES, VECTOR], a vector of neighbours in one lane."""
    return start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _logits(x, column, columns, width, LAST: tl.constexpr):
    """fp32 logits. In the last block -inf beyond ``columns``, where up to ``width`` may be read."""
    if LAST:
        values = tl.load(x + column, mask=column < width, other=float("-inf")).to(tl.float32)
        return tl.where(column < columns, values, float("-inf"))
    else:
        return tl.load(x + column).to(tl.float32)


@triton.jit
def _online(x, top, total):
    """A lane's maximum and its sum of e^(x - maximum) with a vector more. NaN stays in the sum,
    whatever the maximum makes of it.
    """
    highest = tl.maximum(top, tl.max(x, axis=1))
    terms = tl.sum(tl.exp(x - highest[:, None]), axis=1)
    return highest, total * tl.exp(top - highest) + terms


@triton.jit
def _of_lanes(top, total):
    """Maximum of a row, 1 / sum, log of the sum; NaN where there is no sum."""
    highest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - highest), axis=0)
    total = tl.where(total > 0, total, float("nan"))
    return highest, tl.div_rn(1.0, total), tl.where(total > 0, numerics.log(total), total)


@triton.jit
def _clear(x, width, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Zeros in ``width`` elements."""
    zeros = tl.zeros((LANES, VECTOR), tl.float32).to(x.dtype.element_ty)
    for start in range(0, width, LANES * VECTOR):
        column = _columns(start, LANES, VECTOR)
        tl.store(x + column, zeros, mask=column < width)


@triton.jit
def _soft_block(
    student, teacher, gradient, loss, s_max, s_log, t_max, t_inverse, weight,
    column, columns, width, LAST: tl.constexpr,
):  # fmt: skip
    """The loss of each lane with a block more; gradient times ``weight`` is stored."""
    log_q = (_logits(student, column, columns, width, LAST) - s_max) - s_log
    p = tl.exp(_logits(teacher, column, columns, width, LAST) - t_max) * t_inverse
    value = ((tl.exp(log_q) - p) * weight).to(gradient.dtype.element_ty)
    if LAST:
        tl.store(gradient + column, value, mask=column < width)
    else:
        tl.store(gradient + column, value)
    return loss - tl.sum(tl.where(p == 0, 0.0, p * log_q), axis=1)


@triton.jit
def _soft_row(
    student, teacher, gradient, weight, columns, width, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Loss of one row; its gradient times ``weight`` into ``gradient``, which may be student."""
    s_top = tl.full((LANES,), LOWEST, tl.float32)
    t_top = tl.full((LANES,), LOWEST, tl.float32)
    s_total = tl.zeros((LANES,), tl.float32)
    t_total = tl.zeros((LANES,), tl.float32)
    full = columns // (LANES * VECTOR) * (LANES * VECTOR)
    for start in range(0, full, LANES * VECTOR):
        column = _columns(start, LANES, VECTOR)
        s_top, s_total = _online(_logits(student, column, columns, width, False), s_top, s_total)
        t_top, t_total = _online(_logits(teacher, column, columns, width, False), t_top, t_total)
    loss = tl.zeros((LANES,), tl.float32)
    last = _columns(full, LANES, VECTOR)
    if full < columns:
        s_top, s_total = _online(_logits(student, last, columns, width, True), s_top, s_total)
        t_top, t_total = _online(_logits(teacher, last, columns, width, True), t_top, t_total)
    s_max, _, s_log = _of_lanes(s_top, s_total)
    t_max, t_inverse, _ = _of_lanes(t_top, t_total)
    if full < columns:
        loss = _soft_block(
            student, teacher, gradient, loss, s_max, s_log, t_max, t_inverse, weight,
            last, columns, width, True,
        )  # fmt: skip
    for done in range(0, full, LANES * VECTOR):
        loss = _soft_block(
            student, teacher, gradient, loss, s_max, s_log, t_max, t_inverse, weight,
            _columns(full - LANES * VECTOR - done, LANES, VECTOR), columns, width, False,
        )  # fmt: skip
    return tl.sum(loss, axis=0)


@triton.jit(do_not_specialize=["valid", "inverse_count", "losses", "columns"])
def soft_cross_entropy_kernel(
    student, teacher, gradient, valid, inverse_count, losses,
    columns, width, student_stride, teacher_stride, gradient_stride,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    weight = tl.load(inverse_count)
    if tl.load(valid + row):
        loss = _soft_row(student, teacher, gradient, weight, columns, width, LANES, VECTOR)
        tl.store(losses + row, loss)
    else:
        _clear(gradient, width, LANES, VECTOR)
        tl.store(losses + row, 0.0)


@triton.jit
def _scaled_softmax(student, maximum, log_sum, factor, column, columns, width, LAST: tl.constexpr):
    """softmax(student) * factor of a block, in place."""
    log_q = (_logits(student, column, columns, width, LAST) - maximum) - log_sum
    value = (tl.exp(log_q) * factor).to(student.dtype.element_ty)
    if LAST:
        tl.store(student + column, value, mask=column < width)
    else:
        tl.store(student + column, value)


@triton.jit
def _top_k_row(
    student, probabilities, tokens, weight, columns, width, k,
    LANES: tl.constexpr, VECTOR: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Loss of one row against ``k`` probabilities; its gradient times ``weight`` into student."""
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    full = columns // (LANES * VECTOR) * (LANES * VECTOR)
    for start in range(0, full, LANES * VECTOR):
        column = _columns(start, LANES, VECTOR)
        top, total = _online(_logits(student, column, columns, width, False), top, total)
    last = _columns(full, LANES, VECTOR)
    if full < columns:
        top, total = _online(_logits(student, last, columns, width, True), top, total)
    maximum, _, log_sum = _of_lanes(top, total)

    entry = tl.arange(0, ENTRIES)
    p = tl.load(probabilities + entry, mask=entry < k, other=0.0).to(tl.float32)
    token = tl.load(tokens + entry, mask=entry < k, other=0)
    counts = p != 0  # not > 0: NaN has to show; zeros may repeat a token as padding
    inside = (token >= 0) & (token < columns)
    chosen = counts & inside
    logit = tl.load(student + token, mask=chosen, other=0.0).to(tl.float32)
    log_q = (logit - maximum) - log_sum
    terms = tl.where(counts, tl.where(inside, p * log_q, float("nan")), 0.0)
    mass = tl.sum(p, axis=0)
    pushed = (tl.exp(log_q) * mass - p) * weight

    tl.debug_barrier()  # every thread has its entries before they are overwritten
    factor = mass * weight
    if full < columns:
        _scaled_softmax(student, maximum, log_sum, factor, last, columns, width, True)
    for done in range(0, full, LANES * VECTOR):
        column = _columns(full - LANES * VECTOR - done, LANES, VECTOR)
        _scaled_softmax(student, maximum, log_sum, factor, column, columns, width, False)
    tl.debug_barrier()  # the k entries come last
    tl.store(student + token, pushed.to(student.dtype.element_ty), mask=chosen)
    return -tl.sum(terms, axis=0)


@triton.jit(
    do_not_specialize=[
        "probabilities", "tokens", "valid", "inverse_count", "losses", "columns", "k"
    ]
)  # fmt: skip
def top_k_cross_entropy_kernel(
    student, probabilities, tokens, valid, inverse_count, losses,
    columns, width, student_stride, k,
    LANES: tl.constexpr, VECTOR: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    probabilities += row * k
    tokens += row * k
    weight = tl.load(inverse_count)
    if tl.load(valid + row):
        loss = _top_k_row(
            student, probabilities, tokens, weight, columns, width, k, LANES, VECTOR, ENTRIES
        )  # fmt: skip
        tl.store(losses + row, loss)
    else:
        _clear(student, width, LANES, VECTOR)
        tl.store(losses + row, 0.0)


@dataclass(frozen=True)
class LossTile:
    """A block of a row: ``lanes`` lanes with 16 bytes each; one lane a thread."""

    lanes: int
    vector: int

    @property
    def num_warps(self) -> int:
        return self.lanes // 32

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of the kernels."""
        return {"LANES": self.lanes, "VECTOR": self.vector}


def loss_tile(columns: int, itemsize: int) -> LossTile:
    """The tile for rows of ``columns`` logits, the widest of ``itemsize`` bytes.

    16 warps for a real vocabulary: few rows are under way at a time, so the second pass finds more
    of them in L2. 2 for a toy one.
    """
    return LossTile(512 if columns > SHORT_ROW else 64, 16 // itemsize)


def top_k_tile(columns: int, itemsize: int, k: int) -> LossTile:
    """`loss_tile` for ``k`` stored probabilities a row, which the same lanes hold."""
    return loss_tile(columns if k <= MOST_OF_SHORT_ROW else SHORT_ROW + 1, itemsize)


def entries_block(k: int) -> int:
    """The power of two that holds ``k`` stored probabilities of a row.

    Raises:
        InvalidArgument: more than the kernel keeps in registers.
    """
    for block in ENTRY_BLOCKS:
        if k <= block:
            return block
    raise InvalidArgument(f"probabilities: {k} entries a row; store at most {ENTRY_BLOCKS[-1]}")
