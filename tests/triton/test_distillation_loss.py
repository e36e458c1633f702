"""The distillation loss kernels: spec 10, with the ratio rule against fp64."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmqat_kernels.backends.triton import distillation_loss as kernels
from llmqat_kernels.backends.triton.soft_cross_entropy import (
    ENTRY_BLOCKS,
    SHORT_ROW,
    entries_block,
    loss_tile,
)
from llmqat_kernels.errors import InvalidArgument
from llmqat_kernels.spec import distillation as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, assert_within_ratio, generator

from .device import DEVICE, run
from .guard import guard_bands, poisoned

INF = float("inf")
VOCABULARIES = (1, 2, 7, 127, 511, 512, 513, 2049, 4096, 4099)


def inputs(tokens=5, vocabulary=300, dtype=torch.float32, seed=0):
    """student_hidden, student_head, teacher_hidden, teacher_head."""
    g = generator(seed)
    return tuple(
        (torch.randn(*shape, generator=g) * scale).to(dtype)
        for shape, scale in (
            ((tokens, 24), 1),
            ((vocabulary, 24), 0.5),
            ((tokens, 40), 1),
            ((vocabulary, 40), 0.4),
        )
    )


def logits(tokens=3, vocabulary=300, dtype=torch.float32, seed=0):
    """student, teacher."""
    pair = torch.randn(2, tokens, vocabulary, generator=generator(seed)) * 3
    return tuple(pair.to(dtype))


def exact_logits(student, teacher, valid=None):
    """Loss and gradient in fp64."""
    student, teacher = student.double(), teacher.double()
    valid = torch.ones(len(student), dtype=torch.bool) if valid is None else valid
    p, q = teacher.softmax(-1), student.log_softmax(-1)
    count = max(int(valid.sum()), 1)
    loss = -torch.where(p == 0, 0, p * q).sum(-1)[valid].sum() / count
    return loss, torch.where(valid[:, None], (q.exp() - p) / count, 0)


def exact_hidden(hidden, head, gradient):
    """Gradients of hidden and head in fp64 from those of the logits."""
    return gradient @ head.double(), gradient.T @ hidden.double()


def assert_as_accurate(got, baseline, exact):
    """2x for the loss, 3x for the gradients."""
    for index, (a, b, c) in enumerate(zip(got, baseline, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert_within_ratio(a, b, c, 2.0 if index == 0 else 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logits(vocabulary, dtype):
    pair = logits(3, vocabulary, dtype)
    valid = torch.tensor([True, False, True])
    for mask in (None, valid):
        with guard_bands():
            got = run("distillation_loss_logits", *map(poisoned, pair), mask)
        want = spec.distillation_loss_logits(*pair, mask)
        assert_as_accurate(got, want, exact_logits(*pair, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 300, 2051])
def test_hidden_states(vocabulary, dtype):
    args = hidden, head, teacher_hidden, teacher_head = inputs(5, vocabulary, dtype)
    valid = torch.tensor([True, True, False, True, False])
    with guard_bands():
        got = run("distillation_loss", *map(poisoned, args), valid, 2)
    want = spec.distillation_loss(*args, valid, 2)
    loss, gradient = exact_logits(
        hidden.double() @ head.double().T, teacher_hidden.double() @ teacher_head.double().T, valid
    )
    assert_as_accurate(got, want, (loss, *exact_hidden(hidden, head, gradient)))
    assert not got[1][~valid].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "k"), [(1, 1), (7, 3), (300, 8), (300, 200), (2051, 5)])
def test_top_k(vocabulary, k, dtype):
    hidden, head, teacher_hidden, teacher_head = inputs(5, vocabulary, dtype)
    teacher = (teacher_hidden @ teacher_head.T).float().softmax(-1)
    p, tokens = teacher.topk(k)
    valid = torch.tensor([True, True, False, True, False])
    with guard_bands():
        got = run("distillation_loss_top_k", *map(poisoned, (hidden, head, p)), tokens, valid, 2)
    want = spec.distillation_loss_top_k(hidden, head, p, tokens, valid, 2)
    log_q = (hidden.double() @ head.double().T).log_softmax(-1)
    full = torch.zeros_like(log_q).scatter(-1, tokens, p.double())
    loss = -(full * log_q).sum(-1)[valid].sum() / 3
    gradient = (log_q.exp() * p.double().sum(-1, keepdim=True) - full) / 3
    gradient[~valid] = 0
    assert_as_accurate(got, want, (loss, *exact_hidden(hidden, head, gradient)))


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
def test_the_teacher_may_have_another_dtype(student, teacher):
    s, t = logits(2, 700)
    s, t = s.to(student), t.to(teacher)
    want = spec.distillation_loss_logits(s, t)
    assert_as_accurate(run("distillation_loss_logits", s, t), want, exact_logits(s, t))


@pytest.mark.parametrize("chunks", [1, 2, kernels.ROUNDED_CHUNKS, kernels.ROUNDED_CHUNKS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_chunks_is_as_accurate(chunks, dtype):
    args = hidden, head, teacher_hidden, teacher_head = inputs(18, 65, dtype, seed=chunks)
    size = -(-18 // chunks)
    loss, gradient = exact_logits(
        hidden.double() @ head.double().T, teacher_hidden.double() @ teacher_head.double().T
    )
    got, want = run("distillation_loss", *args, None, size), spec.distillation_loss(*args, None, 1)
    assert_as_accurate(got, want, (loss, *exact_hidden(hidden, head, gradient)))


def test_rounded_chunks_against_a_sum_in_fp32():
    """The root mean square error of the head's gradient stays below twice that of fp32 sums."""
    tokens = 3 * kernels.ROUNDED_CHUNKS
    args = hidden, head, teacher_hidden, teacher_head = inputs(tokens, 65, torch.bfloat16)
    _, gradient = exact_logits(
        hidden.double() @ head.double().T, teacher_hidden.double() @ teacher_head.double().T
    )
    exact = exact_hidden(hidden, head, gradient)[1]
    got = run("distillation_loss", *args, None, 3)[2]
    with mock.patch.object(kernels, "ROUNDED_CHUNKS", 1):
        wide = run("distillation_loss", *args, None, 3)[2]
    assert (got - exact).norm() < 2 * (wide - exact).norm()


@pytest.mark.parametrize("op", ["distillation_loss", "distillation_loss_logits"])
def test_the_same_bits_every_run(op):
    args = inputs(6, 2100, torch.bfloat16)
    args = args if op == "distillation_loss" else logits(6, 2100, torch.bfloat16)
    for a, b in zip(run(op, *args, None, 4), run(op, *args, None, 4), strict=True):
        assert_same_bits(a, b)


def test_tied_heads():
    hidden, head, teacher_hidden, _ = inputs()
    args = hidden, head, teacher_hidden[:, :24], head
    for a, b in zip(run("distillation_loss", *args), spec.distillation_loss(*args), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [300, 257, 32])
def test_columns_and_rows_of_wider_tensors(columns):
    """Padded heads and logits come as slices; what lies beyond them is NaN here."""
    student, teacher = (poisoned(x) for x in logits(3, 320))
    for x in (student, teacher):
        x[:, columns:] = float("nan")
    got = run("distillation_loss_logits", student[:, :columns], teacher[:, :columns])
    want = spec.distillation_loss_logits(student[:, :columns].cpu(), teacher[:, :columns].cpu())
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    hidden, head, teacher_hidden, teacher_head = inputs(3, 320)
    args = hidden, head[:columns], teacher_hidden, teacher_head[:columns]
    for a, b in zip(run("distillation_loss", *args), spec.distillation_loss(*args), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_any_layout_of_logits():
    student, teacher = logits(3, 40)
    want = run("distillation_loss_logits", student, teacher)
    got = run("distillation_loss_logits", student.T.contiguous().T, poisoned(teacher, offset=1))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_learn_from(tokens):
    valid = torch.zeros(tokens, dtype=torch.bool)
    loss, hidden, head = run("distillation_loss", *inputs(tokens), valid, 3)
    assert loss.item() == 0 and hidden.shape == (tokens, 24) and not hidden.any() and not head.any()
    loss, gradient = run("distillation_loss_logits", *logits(tokens), valid)
    assert loss.item() == 0 and gradient.shape == (tokens, 300) and not gradient.any()
    p, entries = torch.ones(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int64)
    out = run("distillation_loss_top_k", *inputs(tokens)[:2], p, entries, valid, 3)
    assert not any(x.any() for x in out)


def test_rows_that_do_not_count_are_not_read():
    student, teacher = logits(3)
    valid = torch.tensor([True, False, True])
    clean = run("distillation_loss_logits", student, teacher, valid)
    student[1], teacher[1] = float("nan"), INF
    for a, b in zip(run("distillation_loss_logits", student, teacher, valid), clean, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("value", [1e4, -1e4, 3e38])
def test_huge_logits_are_stable(value):
    student, teacher = logits(2, 600)
    student[0, 7], teacher[0, 9], teacher[1] = value, value, teacher[1] + 1e4
    got = run("distillation_loss_logits", student, teacher)
    assert_as_accurate(
        got,
        spec.distillation_loss_logits(student, teacher),
        exact_logits(student, teacher),
    )
    assert got[1].isfinite().all()


def test_entries_the_teacher_excludes():
    """Probability 0 adds nothing, even where the student has -inf; its own mass is pushed down."""
    student, teacher = logits(2, 600)
    teacher[:, 100:] = -INF
    student[0, 300:] = -INF
    loss, gradient = run("distillation_loss_logits", student, teacher)
    want = spec.distillation_loss_logits(student, teacher)
    assert loss.isfinite() and torch.allclose(loss, want[0], rtol=1e-6)
    assert torch.allclose(gradient, want[1], rtol=1e-5, atol=1e-8)
    assert not gradient[0, 300:].any() and (gradient[1, 100:] > 0).all()


def test_a_student_that_excludes_what_the_teacher_wants():
    student, teacher = logits(1, 20)
    student[0, 3] = -INF
    loss, gradient = run("distillation_loss_logits", student, teacher)
    assert loss.item() == INF and gradient.isfinite().all()


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("where", [0, 599])
@pytest.mark.parametrize("value", [float("nan"), INF, "all -inf"])
def test_nan_shows(who, where, value):
    student, teacher = logits(2, 600)
    row = (student if who == "student" else teacher)[0]
    if value == "all -inf":
        row.fill_(-INF)
    else:
        row[where] = value
    loss, gradient = run("distillation_loss_logits", student, teacher)
    assert loss.isnan() and gradient[0].isnan().all() and gradient[1].isfinite().all()


def test_stored_entries_of_probability_zero_may_repeat():
    hidden, head, *_ = inputs()
    p = torch.tensor([[0.5, 0.0, 0.25, 0.0]]).expand(5, -1)
    tokens = torch.tensor([[7, 7, 3, 7]]).expand(5, -1)
    got = run("distillation_loss_top_k", hidden, head, p, tokens)
    want = spec.distillation_loss_top_k(hidden, head, p[:, ::2], tokens[:, ::2])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_a_stored_token_outside_of_the_vocabulary(token):
    hidden, head, *_ = inputs()
    p, tokens = torch.full((5, 2), 0.5), torch.tensor([[1, token]]).expand(5, -1)
    with guard_bands():
        loss, _, _ = run("distillation_loss_top_k", hidden, head, p, tokens)
    assert loss.isnan()


def test_stored_nan_shows():
    hidden, head, *_ = inputs()
    p, tokens = torch.full((5, 1), float("nan")), torch.zeros(5, 1, dtype=torch.int64)
    loss, gradient, _ = run("distillation_loss_top_k", hidden, head, p, tokens)
    assert loss.isnan() and gradient.isnan().all()


def test_logits_exist_for_one_chunk_only():
    """Two chunks of logits and the results are allocated; with top-k one, and no teacher."""
    sizes = []
    original = kernels.empty

    def empty(shape, dtype, device):
        sizes.append(torch.Size(shape).numel())
        return original(shape, dtype, device)

    with mock.patch.object(kernels, "empty", empty):
        run("distillation_loss", *inputs(6, 500), None, 2)
        assert sum(size >= 2 * 500 for size in sizes) == 3 and max(sizes) == 500 * 24
        sizes.clear()
        hidden, head, *_ = inputs(6, 500)
        p, tokens = torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int64)
        run("distillation_loss_top_k", hidden, head, p, tokens, None, 2)
        assert sum(size >= 2 * 500 for size in sizes) == 2 and max(sizes) == 500 * 24


class _NothingReadBack(TorchDispatchMode):
    """Fails where a tensor's value would be copied to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_to_the_host():
    """By the launchers; a kernel cannot."""
    hidden, head, teacher_hidden, teacher_head = (x.to(DEVICE) for x in inputs(4, 40))
    valid = torch.tensor([True, False, True, True], device=DEVICE)
    p, tokens = torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    with mock.patch.object(kernels, "launch") as launched, _NothingReadBack():
        kernels.distillation_loss(hidden, head, teacher_hidden, teacher_head, valid, 2)
        kernels.distillation_loss_logits(head, head, None)
        kernels.distillation_loss_top_k(hidden, head, p.to(DEVICE), tokens.to(DEVICE), valid, 2)
    assert launched.call_count == 5


def test_tiles():
    assert loss_tile(SHORT_ROW, 2).num_warps == 2
    for columns in (SHORT_ROW + 1, 32_000, 262_144):
        for itemsize in (2, 4):
            tile = loss_tile(columns, itemsize)
            assert tile.num_warps == 16 and tile.vector * itemsize == 16
    compiled = {(v.kernel, *sorted(v.constants.items())) for v in kernels.variants(90)}
    for columns in (1, SHORT_ROW, SHORT_ROW + 1, 128_256):
        for itemsize in (2, 4):
            constants = sorted(loss_tile(columns, itemsize).constants.items())
            assert (kernels.soft_cross_entropy_kernel, *constants) in compiled


def test_stored_entries_fit_a_block():
    for k, block in ((0, 128), (128, 128), (129, 1024), (8192, 8192)):
        assert entries_block(k) == block
    with pytest.raises(InvalidArgument, match="probabilities: 8193 entries a row"):
        entries_block(ENTRY_BLOCKS[-1] + 1)
