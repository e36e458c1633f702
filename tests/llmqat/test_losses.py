"""Losses against whole-logits formulas written out in fp64, and what they leave out of memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llmqat.errors import ConfigError
from llmqat.train.losses import IGNORED_LABEL, TERMS, LossInputs, find_loss, parse_weights

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


def _loss(name, inputs, weights=None):
    return find_loss(name, weights).compute(inputs)[0]


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
    loss, expected = _loss(name, inputs), EXPECTED[name](oracle)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(inputs.student_hidden.grad, oracle.student_hidden.grad)
    torch.testing.assert_close(inputs.student_head.grad, oracle.student_head.grad)


@pytest.mark.parametrize("name", EXPECTED)
def test_chunks_do_not_matter(operands, name):
    whole = _loss(name, _inputs(operands, chunk_size=1000))
    for chunk_size in (1, 4, B * T):
        part = _loss(name, _inputs(operands, chunk_size=chunk_size))
        assert part.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_only_one_chunk_of_logits_is_kept(operands, name):
    """No tensor saved for backward has a row of logits per token."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        _loss(name, _inputs(operands, chunk_size=2))
    assert saved
    assert all(tensor.shape[-1:] != (V,) for tensor in saved)


def test_a_perfect_student_reaches_the_teachers_entropy(operands):
    (_, _, hidden, head), labels = operands
    loss = _loss("logits", LossInputs(hidden, head, hidden, head, labels))
    probabilities = torch.softmax(hidden @ head.T, -1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-6)


def test_nothing_valid_is_zero(operands):
    inputs = _inputs(operands, valid=torch.zeros(B, T, dtype=torch.bool))
    for name in EXPECTED:
        loss = _loss(name, inputs)
        loss.backward()
        assert loss.item() == 0
    assert not inputs.student_hidden.grad.any()


def test_registry():
    assert list(TERMS) == ["label", "logits", "hidden", "attention"]
    needs = {name: find_loss(name).needs_teacher for name in (*TERMS, "label+logits")}
    assert needs == {
        "label": False,
        "logits": True,
        "hidden": True,
        "attention": True,
        "label+logits": True,
    }
    assert [find_loss(name).watches() for name in TERMS] == [False, False, True, True]
    assert find_loss("attention").watches("query")
    assert not find_loss("logits+hidden").watches("query")


def test_a_sum_is_weighted_and_its_order_does_not_matter(operands):
    valid = torch.ones(B, T, dtype=torch.bool)
    one, parts = find_loss("logits+label", [2.0, 3.0]).compute(_inputs(operands, valid=valid))
    other = _loss("label+logits", _inputs(operands, valid=valid), [3.0, 2.0])
    assert torch.equal(one, other)
    assert list(parts) == ["label", "logits"]
    assert not any(part.requires_grad for part in parts.values())
    assert one.item() == pytest.approx(2 * parts["logits"].item() + 3 * parts["label"].item())
    assert find_loss("logits+label", [2, 3]) == find_loss("label+logits", [3, 2])
    assert find_loss("logits+label").name == "label+logits"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("logits+", None, "loss: '' is unknown; use label, logits, hidden, attention or a sum"),
        ("kl", None, "loss: 'kl' is unknown"),
        ("logits+label+logits", None, "has logits twice; give it a weight instead"),
        ("logits+label", [1.0], "loss_weights: 1 given for the 2 terms"),
        ("logits", [0.0], "must be positive; leave a term out"),
        ("logits", [float("nan")], "must be positive"),
    ],
)
def test_refused_sums(name, weights, message):
    with pytest.raises(ConfigError, match=message):
        find_loss(name, weights)


def test_weights_as_text():
    assert parse_weights(None) is None
    assert parse_weights("1, 2.5,10") == [1, 2.5, 10]
    with pytest.raises(ConfigError, match="--loss-weights: '1;2' is not supported"):
        parse_weights("1;2")


def test_saved_probabilities_replace_the_teacher(operands):
    inputs = _inputs(operands)
    logits = inputs.teacher_hidden @ inputs.teacher_head.T
    saved = torch.softmax(logits, -1).topk(V)
    from_saved = replace(inputs, teacher_hidden=None, teacher_head=None, saved=tuple(saved))
    for name in ("logits", "label+logits"):
        assert _loss(name, from_saved).item() == pytest.approx(_loss(name, inputs).item(), rel=1e-6)


def test_block_losses_need_blocks(operands):
    for name in ("hidden", "attention"):
        with pytest.raises(ConfigError, match=f"loss: {name} needs the same blocks"):
            _loss(name, _inputs(operands))


def test_logits_without_teacher(operands):
    (hidden, head, _, _), labels = operands
    with pytest.raises(ConfigError, match="teacher"):
        _loss("logits", LossInputs(hidden, head, None, None, labels))
