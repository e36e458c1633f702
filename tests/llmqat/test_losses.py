"""Losses against whole-logits formulas written out in fp64, and what they leave out of memory."""

import pytest
import torch
import torch.nn.functional as F

from llmqat.errors import ConfigError
from llmqat.train.losses import IGNORED_LABEL, LOSSES, LossInputs, find_loss

B, T, H, V = 2, 7, 8, 11


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H), (V, H), (B, T, 5), (V, 5)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    labels = torch.randint(V, (B, T), generator=generator)
    return tensors, labels


def _inputs(operands, *, valid=None, chunk_size=3, grad=True):
    (hidden, head, teacher_hidden, teacher_head), labels = operands
    hidden, head = hidden.clone().requires_grad_(grad), head.clone().requires_grad_(grad)
    return LossInputs(hidden, head, teacher_hidden, teacher_head, labels, valid, chunk_size)


def _soft(inputs):
    student = torch.log_softmax(inputs.student_hidden.double() @ inputs.student_head.double().T, -1)
    teacher = torch.softmax(inputs.teacher_hidden.double() @ inputs.teacher_head.double().T, -1)
    losses = -(teacher * student).sum(-1)
    return losses.mean() if inputs.valid is None else losses[inputs.valid].mean()


def _hard(inputs):
    logits = inputs.student_hidden.double() @ inputs.student_head.double().T
    labels = inputs.labels
    if inputs.valid is not None:
        labels = labels.masked_fill(~inputs.valid, IGNORED_LABEL)
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


EXPECTED = {
    "logits": _soft,
    "label": _hard,
    "label+logits": lambda inputs: _soft(inputs) + _hard(inputs),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_value_and_gradient(operands, name, masked):
    valid = None
    if masked:
        valid = torch.ones(B, T, dtype=torch.bool)
        valid[0, 4:] = valid[1, 0] = False
    inputs, oracle = (_inputs(operands, valid=valid) for _ in range(2))
    loss, expected = LOSSES[name].compute(inputs), EXPECTED[name](oracle)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(inputs.student_hidden.grad, oracle.student_hidden.grad)
    torch.testing.assert_close(inputs.student_head.grad, oracle.student_head.grad)


@pytest.mark.parametrize("name", EXPECTED)
def test_chunks_do_not_matter(operands, name):
    whole = LOSSES[name].compute(_inputs(operands, chunk_size=1000))
    for chunk_size in (1, 4, B * T):
        part = LOSSES[name].compute(_inputs(operands, chunk_size=chunk_size))
        assert part.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_only_one_chunk_of_logits_is_kept(operands, name):
    """No tensor saved for backward has a row of logits per token."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        LOSSES[name].compute(_inputs(operands, chunk_size=2))
    assert saved
    assert all(tensor.shape[-1:] != (V,) for tensor in saved)


def test_a_perfect_student_reaches_the_teachers_entropy(operands):
    (_, _, hidden, head), labels = operands
    loss = LOSSES["logits"].compute(LossInputs(hidden, head, hidden, head, labels))
    probabilities = torch.softmax(hidden @ head.T, -1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-6)


def test_nothing_valid_is_zero(operands):
    inputs = _inputs(operands, valid=torch.zeros(B, T, dtype=torch.bool))
    for name in EXPECTED:
        loss = LOSSES[name].compute(inputs)
        loss.backward()
        assert loss.item() == 0
    assert not inputs.student_hidden.grad.any()


def test_registry():
    assert list(LOSSES) == ["logits", "label", "label+logits"]
    assert [find_loss(name).needs_teacher for name in LOSSES] == [True, False, True]
    with pytest.raises(ConfigError, match="loss: 'hidden' is unknown; use one of logits, label"):
        find_loss("hidden")


def test_logits_without_teacher(operands):
    (hidden, head, _, _), labels = operands
    with pytest.raises(ConfigError, match="teacher"):
        LOSSES["logits"].compute(LossInputs(hidden, head, None, None, labels))
