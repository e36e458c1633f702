"""The public forms of the distillation loss (hidden states, logits, stored top k) on every backend:
spec 10, by hand and against autograd of plain torch in fp64."""

import math

import pytest
import torch

import llmqat_kernels as qk
from benchmarks.entries.heads import GPU_LOSSES
from llmqat_kernels.errors import InvalidArgument, InvalidArgumentType
from llmqat_kernels.functional.heads import default_chunk_size
from llmqat_kernels.spec import distillation as spec
from llmqat_kernels.testing import generator

UPSTREAM = 2.5
"""Not 1: a backward that forgets the gradient from above would pass."""


def make(tokens=(2, 4), vocabulary=37, width=6, teacher_width=5):
    """student_hidden, student_head, teacher_hidden, teacher_head in fp32."""
    g = generator(0)
    shapes = (*tokens, width), (vocabulary, width), (*tokens, teacher_width)
    tensors = [torch.randn(*shape, generator=g) for shape in shapes]
    tensors.append(torch.randn(vocabulary, teacher_width, generator=g))
    return [x.requires_grad_() if i < 2 else x for i, x in enumerate(tensors)]


def mask(tokens=(2, 4)):
    """valid, with True and False in it."""
    return torch.arange(math.prod(tokens)).reshape(tokens) % 3 != 1


def gradients(loss, *leaves):
    """Of UPSTREAM * loss."""
    return torch.autograd.grad(loss * UPSTREAM, leaves)


def plain(student, teacher, valid=None):
    """The loss of fp64 logits in plain torch; `teacher` are probabilities."""
    losses = -(teacher * student.log_softmax(-1)).sum(-1)
    return losses.mean() if valid is None else losses[valid].mean()


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_against_autograd(backend, masked):
    hidden, head, teacher_hidden, teacher_head = make()
    valid = mask() if masked else None
    loss = qk.distillation_loss(
        hidden, head, teacher_hidden, teacher_head, valid=valid, chunk_size=3
    )
    x, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    teacher = (teacher_hidden.double() @ teacher_head.double().T).softmax(-1)
    want = plain(x @ w.T, teacher, valid)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close((loss, *gradients(loss, hidden, head)), (want, *gradients(want, x, w)))


@pytest.mark.parametrize("masked", [False, True])
def test_logits_against_autograd(backend, masked):
    student, teacher = torch.randn(2, 2, 4, 37, generator=generator(1)) * 3
    student.requires_grad_()
    valid = mask() if masked else None
    loss = qk.distillation_loss_logits(student, teacher, valid=valid, chunk_size=3)
    exact = student.detach().double().requires_grad_()
    want = plain(exact, teacher.double().softmax(-1), valid)
    assert_close((loss, *gradients(loss, student)), (want, *gradients(want, exact)))


@pytest.mark.parametrize("masked", [False, True])
def test_top_k_against_autograd(backend, masked):
    hidden, head, teacher_hidden, teacher_head = make()
    p, tokens = (teacher_hidden @ teacher_head.T).softmax(-1).topk(5)
    valid = mask() if masked else None
    loss = qk.distillation_loss_top_k(hidden, head, p, tokens, valid=valid, chunk_size=3)
    x, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    # The stored probabilities do not sum to 1: what is missing is not spread over the rest.
    teacher = torch.zeros(2, 4, 37, dtype=torch.float64).scatter(-1, tokens, p.double())
    want = plain(x @ w.T, teacher, valid)
    assert_close((loss, *gradients(loss, hidden, head)), (want, *gradients(want, x, w)))


def test_logits_by_hand(backend):
    # Teacher 1/4, 3/4; student 1/2, 1/2: the loss is ln 2, the gradient 1/4, -1/4.
    student = torch.tensor([[1.0, 1.0]], requires_grad=True)
    loss = qk.distillation_loss_logits(student, torch.tensor([[0.0, math.log(3)]]))
    assert abs(loss.item() - math.log(2)) < 1e-6
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(gradient, torch.tensor([[0.25, -0.25]]), atol=1e-6)


def test_top_k_by_hand(backend):
    # The student has 1/4 everywhere; 1/2 and 1/4 are stored: loss 3/4 ln 4, gradient of the logits
    # 3/4 * 1/4 - p = -5/16, 3/16, -1/16, 3/16.
    hidden = torch.zeros(1, 4, requires_grad=True)
    head = torch.eye(4, requires_grad=True)
    p, tokens = torch.tensor([[0.5, 0.25]]), torch.tensor([[0, 2]])
    loss = qk.distillation_loss_top_k(hidden, head, p, tokens)
    assert abs(loss.item() - 0.75 * math.log(4)) < 1e-6
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(gradient, torch.tensor([[-5.0, 3.0, -1.0, 3.0]]) / 16, atol=1e-7)


def test_the_forms_agree(backend):
    """Logits are hidden states times the head; all entries stored are the whole teacher."""
    hidden, head, teacher_hidden, teacher_head = make()
    valid = mask()
    loss = qk.distillation_loss(hidden, head, teacher_hidden, teacher_head, valid=valid)
    want = loss, *gradients(loss, hidden, head)
    teacher = teacher_hidden @ teacher_head.T
    by_logits = qk.distillation_loss_logits(hidden @ head.T, teacher, valid=valid)
    assert_close((by_logits, *gradients(by_logits, hidden, head)), want)
    p, tokens = teacher.softmax(-1).topk(37)
    stored = qk.distillation_loss_top_k(hidden, head, p, tokens, valid=valid)
    assert_close((stored, *gradients(stored, hidden, head)), want)


def test_vocab_size_leaves_out_padding(backend):
    hidden, head, teacher_hidden, teacher_head = make()
    loss = qk.distillation_loss(hidden, head[:30], teacher_hidden, teacher_head[:30])
    want = loss, *gradients(loss, hidden, head)
    padded = qk.distillation_loss(hidden, head, teacher_hidden, teacher_head, vocab_size=30)
    got = padded, *gradients(padded, hidden, head)
    assert_close(got, want)
    assert not got[2][30:].any()
    # The heads may be padded differently.
    other = qk.distillation_loss(hidden, head, teacher_hidden, teacher_head[:33], vocab_size=30)
    assert_close((other,), (loss,))
    student, teacher = (hidden @ head.T).detach().requires_grad_(), teacher_hidden @ teacher_head.T
    by_logits = qk.distillation_loss_logits(student, teacher, vocab_size=30)
    (gradient,) = gradients(by_logits, student)
    assert_close((by_logits,), (loss,))
    assert not gradient[..., 30:].any()
    p, tokens = teacher[..., :30].softmax(-1).topk(30)
    stored = qk.distillation_loss_top_k(hidden, head, p, tokens, vocab_size=30)
    assert_close((stored, *gradients(stored, hidden, head)), want)


def test_tied_heads_get_the_students_gradient(backend):
    hidden, head, *_ = make()
    teacher_hidden = torch.randn(2, 4, 6, generator=generator(2))
    tied = qk.distillation_loss(hidden, head, teacher_hidden, head)
    apart = qk.distillation_loss(hidden, head, teacher_hidden, head.detach().clone())
    assert_close((tied, *gradients(tied, hidden, head)), (apart, *gradients(apart, hidden, head)))


def test_tokens_that_do_not_count_may_hold_anything(backend):
    hidden, head, teacher_hidden, teacher_head = make()
    valid = mask()
    loss = qk.distillation_loss(hidden, head, teacher_hidden, teacher_head, valid=valid)
    want = loss, *gradients(loss, hidden, head)
    broken = hidden.detach().masked_fill(~valid[..., None], float("nan")).requires_grad_()
    teacher_broken = teacher_hidden.masked_fill(~valid[..., None], float("inf"))
    loss = qk.distillation_loss(broken, head, teacher_broken, teacher_head, valid=valid)
    assert_close((loss, *gradients(loss, broken, head)), want)
    p, tokens = (teacher_hidden @ teacher_head.T).softmax(-1).topk(3)
    p = p.masked_fill(~valid[..., None], float("nan"))
    loss = qk.distillation_loss_top_k(broken, head, p, tokens, valid=valid)
    assert all(x.isfinite().all() for x in (loss, *gradients(loss, broken, head)))


@pytest.mark.parametrize("tokens", [(2, 4), (0,)])
def test_no_token_that_counts(backend, tokens):
    hidden, head, teacher_hidden, teacher_head = make(tokens)
    valid = torch.zeros(tokens, dtype=torch.bool)
    loss = qk.distillation_loss(hidden, head, teacher_hidden, teacher_head, valid=valid)
    p, entries = torch.ones(*tokens, 2), torch.zeros(*tokens, 2, dtype=torch.int64)
    stored = qk.distillation_loss_top_k(hidden, head, p, entries, valid=valid)
    for value in (loss, stored):
        assert value.item() == 0
        assert not any(x.any() for x in gradients(value, hidden, head))
    student = torch.randn(*tokens, 9, requires_grad=True)
    by_logits = qk.distillation_loss_logits(student, torch.randn(*tokens, 9), valid=valid)
    assert by_logits.item() == 0 and not gradients(by_logits, student)[0].any()


def test_a_teacher_that_is_nan_shows(backend):
    hidden, head, teacher_hidden, teacher_head = make()
    teacher_hidden[0, 0, 0] = float("nan")
    assert qk.distillation_loss(hidden, head, teacher_hidden, teacher_head).isnan()
    student, teacher = (hidden @ head.T).detach(), teacher_hidden @ teacher_head.T
    assert qk.distillation_loss_logits(student, teacher).isnan()
    p, tokens = torch.full((2, 4, 1), float("nan")), torch.zeros(2, 4, 1, dtype=torch.int64)
    assert qk.distillation_loss_top_k(hidden, head, p, tokens).isnan()


def test_stored_padding_of_probability_zero_may_repeat_a_token(backend):
    hidden, head, *_ = make((3,))
    p = torch.tensor([[0.5, 0.0, 0.25]]).expand(3, -1)
    tokens = torch.tensor([[7, 7, 3]]).expand(3, -1)
    loss = qk.distillation_loss_top_k(hidden, head, p, tokens)
    want = qk.distillation_loss_top_k(hidden, head, p[:, ::2], tokens[:, ::2])
    assert_close((loss, *gradients(loss, hidden, head)), (want, *gradients(want, hidden, head)))


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_chunks_of_the_specification_do_not_matter(chunk_size):
    hidden, head, teacher_hidden, teacher_head = (x.detach() for x in make((8,)))
    teacher = teacher_hidden @ teacher_head.T
    p, tokens = teacher.softmax(-1).topk(4)
    valid = mask((8,))
    for op, args in (
        (spec.distillation_loss_logits, (hidden @ head.T, teacher)),
        (spec.distillation_loss_top_k, (hidden, head, p, tokens)),
    ):
        assert_close(op(*args, valid, chunk_size), op(*args, valid, 1000))


def test_default_chunks_hold_a_small_part_of_all_logits():
    """Two bf16 chunks of logits against the 15 bytes a logit that plain torch was counted to hold:
    at most 10 % at the shapes of the benchmark, and wherever there are 1024 tokens or more.
    """
    shapes = [shape["n"] for shape in GPU_LOSSES.shapes]
    for tokens in (*shapes, *range(1024, 8193, 511)):
        assert 2 * 2 * default_chunk_size(tokens) <= 0.10 * 15 * tokens, tokens


def test_the_default_chunk_is_what_the_function_says(monkeypatch):
    args = [x.detach() for x in make((2, 1100))]
    given = []
    real = torch.ops.llmqat.distillation_loss
    monkeypatch.setattr(
        torch.ops.llmqat, "distillation_loss", lambda *a: given.append(a[-1]) or real(*a)
    )
    default = qk.distillation_loss(*args)
    assert torch.equal(default, qk.distillation_loss(*args, chunk_size=512))
    assert given == [512, 512] == [default_chunk_size(2200), 512]


def test_bad_arguments_name_the_argument(backend):
    hidden, head, teacher_hidden, teacher_head = (x.detach() for x in make())
    args = hidden, head, teacher_hidden, teacher_head
    p, tokens = torch.ones(2, 4, 3), torch.zeros(2, 4, 3, dtype=torch.int64)
    logits = hidden @ head.T
    half = head.to(torch.bfloat16)
    cases = (
        (qk.distillation_loss, args, {"vocab_size": 0}, "vocab_size: 0 must be 1..37"),
        (qk.distillation_loss, args, {"vocab_size": 38}, "vocab_size: 38 must be 1..37"),
        (qk.distillation_loss, args, {"chunk_size": 0}, "chunk_size: 0 must"),
        (qk.distillation_loss, args, {"valid": mask((8,))}, "valid: expected shape"),
        (qk.distillation_loss, (*args[:3], teacher_head[:9]), {}, "teacher_head: expected shape"),
        (
            qk.distillation_loss,
            (hidden, head[:0], teacher_hidden, teacher_head[:0]),
            {},
            "is empty",
        ),
        (qk.distillation_loss_logits, (logits, logits[..., :3]), {}, "teacher_logits: expected"),
        (qk.distillation_loss_logits, (logits[..., :0],) * 2, {}, "is empty"),
        (qk.distillation_loss_top_k, (hidden, head, p[:1], tokens), {}, "probabilities: expected"),
        (qk.distillation_loss_top_k, (hidden, head, p, tokens[:1]), {}, "tokens: expected"),
    )
    for op, arguments, options, message in cases:
        with pytest.raises(InvalidArgument, match=message):
            op(*arguments, **options)
    with pytest.raises(InvalidArgumentType, match=r"student_head: dtype torch\.bfloat16"):
        qk.distillation_loss(hidden, half, teacher_hidden, teacher_head)
    with pytest.raises(InvalidArgumentType, match=r"tokens: dtype torch\.int32"):
        qk.distillation_loss_top_k(hidden, head, p, tokens.int())


@pytest.mark.parametrize("form", ["hidden", "logits", "top k"])
def test_a_loss_scale_saves_the_gradients_of_an_fp16_student(backend, form):
    """They carry 1/n: rounded to fp16 before the scale reaches them, the small ones are lost. And
    GradScaler's first scale is no number of fp16.
    """
    tokens, vocabulary, scale = (2, 6), 257, 2.0**16
    made = make(tokens, vocabulary, width=16, teacher_width=16)
    hidden, head, teacher_hidden, teacher_head = (x.detach().half() for x in made)
    probabilities = (teacher_hidden.float() @ teacher_head.float().T).softmax(-1)

    def loss_of(x, w):
        if form == "hidden":
            return qk.distillation_loss(x, w, teacher_hidden, teacher_head)
        if form == "logits":
            return qk.distillation_loss_logits(x @ w.T, teacher_hidden @ teacher_head.T)
        return qk.distillation_loss_top_k(x, w, *probabilities.topk(40))

    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    got = torch.autograd.grad(loss_of(*leaves) * scale, leaves)
    wide = [x.double().requires_grad_() for x in (hidden, head)]
    p = probabilities.double()
    if form == "top k":
        kept, places = p.topk(40)
        p = torch.zeros_like(p).scatter_(-1, places, kept)
    want = torch.autograd.grad(plain(wide[0] @ wide[1].T, p), wide)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float16 and a.isfinite().all()
        assert (a.double() / scale - b).norm() <= 0.01 * b.norm()


def test_autocast_casts_hidden_states_and_heads(backend):
    """As for `nn.Linear`: bf16 hidden states meet the fp32 weight of a head."""
    hidden, head, teacher_hidden, teacher_head = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = qk.distillation_loss(hidden.bfloat16(), head, teacher_hidden, teacher_head)
    narrow = [x.bfloat16() for x in (hidden, head, teacher_hidden, teacher_head)]
    assert torch.equal(loss, qk.distillation_loss(*narrow))
    (gradient,) = torch.autograd.grad(loss, head)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("token", [-1, 37, 2**40])
def test_stored_tokens_outside_the_vocabulary(backend, token):
    hidden, head, *_ = make()
    tokens = torch.tensor([3, token]).expand(2, 4, 2)
    padding = torch.tensor([0.9, 0.0]).expand(2, 4, 2)
    loss = qk.distillation_loss_top_k(hidden, head, padding, tokens)
    alone = qk.distillation_loss_top_k(hidden, head, padding[..., :1], tokens[..., :1])
    assert_close((loss, *gradients(loss, hidden, head)), (alone, *gradients(alone, hidden, head)))
    mistake = torch.tensor([0.9, 0.1]).expand(2, 4, 2)
    assert qk.distillation_loss_top_k(hidden, head, mistake, tokens).isnan()


@pytest.mark.parametrize("k", [0, 38])
def test_more_stored_entries_than_the_vocabulary_has(backend, k):
    hidden, head, *_ = make()
    with pytest.raises(InvalidArgument, match=r"probabilities: \d+ a token must be 1..37"):
        stored = torch.zeros(2, 4, k)
        qk.distillation_loss_top_k(hidden, head, stored, stored.long())
