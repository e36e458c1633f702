"""distillation_loss and its fused pass: spec 10, against autograd in float64."""

import math

import pytest
import torch

from llmqat_kernels.spec import distillation as spec
from llmqat_kernels.testing import assert_same_bits, assert_within_ratio, generator

native = torch.ops.llmqat_cpu
INF = float("inf")


def inputs(tokens=13, vocabulary=300, dtype=torch.float32):
    g = generator(0)
    return tuple(
        (torch.randn(*shape, generator=g) * scale).to(dtype)
        for shape, scale in (
            ((tokens, 24), 1),
            ((vocabulary, 24), 0.5),
            ((tokens, 40), 1),
            ((vocabulary, 40), 0.4),
        )
    )


def float64(student_hidden, student_head, teacher_hidden, teacher_head, valid=None):
    """Loss and gradients by autograd in float64."""
    hidden = student_hidden.double().requires_grad_()
    head = student_head.double().requires_grad_()
    teacher = (teacher_hidden.double() @ teacher_head.double().T).softmax(-1)
    losses = -(teacher * (hidden @ head.T).log_softmax(-1)).sum(-1)
    loss = (losses if valid is None else losses[valid]).mean()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


OPS = pytest.mark.parametrize("op", ["spec", "native"])


def op_named(name):
    return spec.distillation_loss if name == "spec" else native.distillation_loss


def pass_named(name):
    return spec.soft_cross_entropy if name == "spec" else native.soft_cross_entropy


@OPS
def test_hand_written_numbers(isa, op):
    # Teacher 1/4, 3/4; student 1/2, 1/2: the loss is ln 2, the gradient 1/4, -1/4.
    student = torch.tensor([[1.0, 1.0]])
    loss = pass_named(op)(student, torch.tensor([[0.0, math.log(3)]]), None, 1.0)
    assert abs(loss.item() - math.log(2)) < 1e-6
    assert torch.allclose(student, torch.tensor([[0.25, -0.25]]), atol=1e-6)


@OPS
@pytest.mark.parametrize("masked", [False, True])
def test_against_autograd_in_float64(isa, op, masked):
    args = inputs()
    valid = torch.rand(13, generator=generator(1)) > 0.4 if masked else None
    got, want = op_named(op)(*args, valid, 5), float64(*args, valid)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, rtol=2e-5, atol=2e-6)


def test_native_is_as_accurate_as_plain_torch(isa):
    args = inputs(tokens=7, vocabulary=5000)
    plain, want = spec.distillation_loss(*args), float64(*args)
    for a, b, c in zip(native.distillation_loss(*args), plain, want, strict=True):
        assert_within_ratio(a, b, c, 3.0)


@OPS
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_chunks_do_not_matter(isa, op, chunk_size):
    args = inputs()
    valid = torch.rand(13, generator=generator(2)) > 0.3
    for a, b in zip(
        op_named(op)(*args, valid, chunk_size), op_named(op)(*args, valid, 1000), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@OPS
def test_no_valid_token_gives_zero(isa, op):
    loss, hidden, head = op_named(op)(*inputs(), torch.zeros(13, dtype=torch.bool), 4)
    assert loss.item() == 0 and not hidden.any() and not head.any()
    loss, hidden, head = op_named(op)(*inputs(tokens=0))
    assert loss.item() == 0 and hidden.shape == (0, 24) and not head.any()


@OPS
def test_invalid_tokens_may_hold_anything(isa, op):
    args = inputs()
    valid = torch.ones(13, dtype=torch.bool)
    valid[4] = False
    clean = op_named(op)(*args, valid)
    teacher_hidden = args[2].clone()
    teacher_hidden[4] = float("nan")
    for a, b in zip(
        op_named(op)(args[0], args[1], teacher_hidden, args[3], valid), clean, strict=True
    ):
        assert_same_bits(a, b)
    assert not clean[1][4].any()


@OPS
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1023, 1024, 1025, 3000])
def test_padded_vocabulary(isa, op, vocabulary):
    """Entries of -inf on both sides change nothing and get no gradient."""
    student, teacher = torch.randn(2, 3, vocabulary, generator=generator(3)) * 3
    padding = torch.full((3, 5), -INF)
    padded = torch.cat((student, padding), -1)
    loss = pass_named(op)(padded, torch.cat((teacher, padding), -1), None, 1 / 3)
    alone = student.clone()
    want = pass_named(op)(alone, teacher, None, 1 / 3)
    assert torch.allclose(loss, want, rtol=1e-6, atol=1e-7)
    assert (
        torch.allclose(padded[:, :vocabulary], alone, rtol=1e-6, atol=1e-8)
        and not padded[:, vocabulary:].any()
    )


@OPS
def test_teacher_without_an_entry_ignores_the_student(isa, op):
    teacher = torch.tensor([[0.0, 1.0, -INF]])
    student = torch.tensor([[0.5, 0.25, 2.0]])
    first = pass_named(op)(student, teacher, None, 1.0)
    assert first.isfinite() and student.isfinite().all()
    assert student[0, 2] > 0  # the student's own probability is pushed down


@OPS
def test_nan_shows(isa, op):
    student = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, 2.0]])
    loss = pass_named(op)(student, torch.zeros(2, 3), None, 0.5)
    assert loss.isnan() and student[0].isnan().all() and student[1].isfinite().all()


@OPS
def test_bfloat16(isa, op):
    args = inputs(dtype=torch.bfloat16)
    loss, hidden, head = op_named(op)(*args)
    assert loss.dtype == torch.float32 and hidden.dtype == head.dtype == torch.bfloat16
    want = float64(*args)
    assert torch.allclose(loss.double(), want[0], rtol=2e-2)
    assert torch.allclose(hidden.double(), want[1], rtol=0.1, atol=2e-3)


def test_inputs_are_not_changed(isa):
    args = inputs()
    before = [t.clone() for t in args]
    native.distillation_loss(*args)
    for a, b in zip(args, before, strict=True):
        assert_same_bits(a, b)


def test_bad_arguments_name_the_argument(isa):
    h, w, t, u = inputs()
    for message, args in {
        "student_head: expected size 24": (h, u, t, u),
        "teacher_hidden: expected size 13": (h, w, t[:5], u),
        "teacher_head: expected size 300": (h, w, t, u[:7]),
        "valid": (h, w, t, u, torch.ones(5, dtype=torch.bool)),
        "chunk_size": (h, w, t, u, None, 0),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            native.distillation_loss(*args)
