"""QATTrainer: it learns, keeps its teacher, and refuses what it cannot train."""

import copy
import json

import pytest
import torch
from torch import nn

from llmqat.config import QATConfig
from llmqat.convert import convert, prepare, state_of
from llmqat.errors import ConfigError
from llmqat.train import QATTrainer, training_arguments
from llmqat.train.losses import TERMS, Term, find_loss
from llmqat.train.metrics import CURVE_COLUMNS, MetricsLog, read_metrics
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.training import (
    CONFIG,
    assert_same_state,
    build_trainer,
    logged,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("on_reference")


def _kl(student, teacher, ids):
    with torch.no_grad():
        p, q = (torch.log_softmax(m.eval()(ids).logits.double(), -1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_learns_and_leaves_the_teacher_alone(tmp_path):
    teacher = tiny_llama(heads=4, head_dim=32, tied=True)
    before = copy.deepcopy(teacher.state_dict())
    student = prepare(copy.deepcopy(teacher), QATConfig.parse("4-8-4", kv_mode="serving"))
    ids = random_tokens(9, 4, 48)
    first = _kl(student, teacher, ids)
    # A random model has nothing to generalise: it learns these four sequences, seen in every step.
    data = [{"input_ids": row} for row in ids] * 24
    trainer = build_trainer(
        tmp_path,
        steps=24,
        teacher=teacher,
        student=student,
        data=data,
        per_device_train_batch_size=4,
        save_steps=100,
    )
    trainer.train()
    assert _kl(student, teacher, ids) < 0.4 * first
    assert_same_state(dict(teacher.state_dict()), dict(before))
    assert state_of(teacher) is None
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module is teacher for module in trainer.model.modules())
    entries = logged(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 25))
    assert entries[-1]["tokens"] == 24 * 4 * 48
    assert all("health/flipped" in entry for entry in entries if entry["step"] % 2 == 0)
    assert 0 < entries[1]["health/flipped"] < 0.5


def test_accumulation_equals_a_large_batch(tmp_path):
    """The same eight sequences as one batch and as four: equal up to the rounding of sums."""
    finals = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = build_trainer(
            tmp_path / str(batch),
            steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        finals.append((logged(tmp_path / str(batch)), trainer.model.state_dict()))
    for one, four in zip(*(losses for losses, _ in finals), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-2)
        assert one["tokens"] == four["tokens"]


@pytest.mark.parametrize("config", [CONFIG, QATConfig.parse("4-8-8", ste_clip=2.0)])
def test_gradient_checkpointing_changes_nothing(tmp_path, config):
    for name in ("off", "on"):
        build_trainer(
            tmp_path / name, steps=3, config=config, gradient_checkpointing=name == "on"
        ).train()
    assert logged(tmp_path / "on") == logged(tmp_path / "off")


def test_bf16_autocast_keeps_fp32_masters(tmp_path):
    teacher = tiny_llama(tied=True)
    student = prepare(copy.deepcopy(teacher), CONFIG)
    half = copy.deepcopy(teacher).bfloat16()
    build_trainer(tmp_path / "bf16", steps=4, student=student, teacher=half, bf16=True).train()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    build_trainer(tmp_path / "fp32", steps=4).train()
    for one, other in zip(logged(tmp_path / "bf16"), logged(tmp_path / "fp32"), strict=True):
        assert one["loss"] != other["loss"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.03)


def test_chunks_do_not_change_the_run(tmp_path):
    for chunk in (7, 1024):
        build_trainer(tmp_path / str(chunk), steps=3, chunk_size=chunk).train()
    for one, other in zip(logged(tmp_path / "7"), logged(tmp_path / "1024"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_padding_does_not_count(tmp_path):
    ids = random_tokens(5, 1, 16)[0]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(8, dtype=torch.int64)]),
        "attention_mask": torch.tensor([1] * 16 + [0] * 8),
    }
    trainer = build_trainer(tmp_path, data=[{"input_ids": ids}])
    for loss in ("logits", "label"):
        trainer.loss = find_loss(loss)
        with torch.no_grad():
            losses = [
                trainer.compute_loss(trainer.model, {k: v[None] for k, v in item.items()})
                for item in ({"input_ids": ids}, padded)
            ]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_label_loss_needs_no_teacher(tmp_path):
    student = prepare(tiny_llama(), CONFIG)
    arguments = training_arguments(
        str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, learning_rate=1e-3
    )
    trainer = QATTrainer(student, arguments, token_rows(), loss="label", health_steps=0)
    trainer.train()
    assert trainer.teacher is None
    assert not any(key.startswith("health") for entry in logged(tmp_path) for key in entry)


def test_a_diverged_run_stops_before_it_saves(tmp_path, monkeypatch):
    nan = Term("logits", lambda x: x.student_hidden.sum() * float("nan"), needs_teacher=True)
    monkeypatch.setitem(TERMS, "logits", nan)
    with pytest.raises(RuntimeError, match="loss is nan at step 1; lower the learning rate"):
        build_trainer(tmp_path, save_steps=1).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_defaults_are_the_papers(tmp_path):
    arguments = training_arguments(str(tmp_path), use_cpu=True)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.warmup_steps) == (2e-5, 0, 0)
    assert (arguments.lr_scheduler_type, arguments.optim) == ("cosine", "adamw_torch_fused")
    assert (arguments.num_train_epochs, arguments.max_grad_norm, arguments.seed) == (1, 1, 42)
    trainer = QATTrainer(
        prepare(tiny_llama(), CONFIG), arguments, token_rows(), teacher=tiny_llama(seed=1)
    )
    assert not trainer.model_accepts_loss_kwargs
    optimizer = trainer.create_optimizer()
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.999)}


def test_metrics_log_survives_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rewind(0) == 0
    for step in (1, 2, 3):
        log.append({"step": step, "seconds": step / 2})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "los')
    assert [entry["step"] for entry in read_metrics(log.path)] == [1, 2, 3]
    assert log.rewind(2) == 1.0
    log.append({"step": 3})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


def test_training_curve(straight):
    lines = (straight / "training_curve.csv").read_text().splitlines()
    assert lines[0].split(",") == list(CURVE_COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, 11)]
    assert float(lines[4].split(",")[2]) == logged(straight)[3]["loss"]


def _headless():
    model = tiny_llama()
    model.lm_head = nn.Sequential(model.lm_head)
    return model


def _student():
    return prepare(tiny_llama(), CONFIG)


class Rows(tuple):
    """A data set of the rows it is given; true when it is empty."""

    def __new__(cls, *rows):
        return super().__new__(cls, rows)

    def __bool__(self):
        return True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"student": prepare(tiny_llama(), CONFIG).bfloat16()}, "is bfloat16.*in float32"),
        (lambda: {"student": _headless()}, "student: .* has no plain linear head"),
        (lambda: {"teacher": _headless(), "student": _student()}, "teacher: .* no plain linear"),
        (lambda: {"teacher": tiny_llama(vocab=64), "student": _student()}, "vocabulary of 64"),
        (lambda: {"student": tiny_llama()}, r"nothing of it is quantized; call llmqat\.prepare"),
        (lambda: {"student": convert(_student())}, "student: is converted, an inference form"),
        (lambda: {"data": Rows()}, "train_dataset: is empty"),
        (lambda: {"data": Rows({"labels": torch.ones(4)})}, "train_dataset: .* no input_ids"),
        (
            lambda: {"data": Rows({"input_ids": torch.full((4,), 10**6)})},
            "train_dataset: id 1000000 is outside the vocabulary",
        ),
        (lambda: {"loss": "kl"}, "loss: 'kl' is unknown"),
        (lambda: {"loss": "hidden", "loss_layers": "2"}, r"student has blocks 0..1, got \[2\]"),
        (lambda: {"loss": "hidden", "loss_layers": "x"}, "--loss-layers: 'x' is not supported"),
        (lambda: {"loss": "hidden", "loss_layers": "1,1"}, "names a block twice"),
        (
            lambda: {"loss": "attention", "teacher": tiny_llama(layers=1), "student": _student()},
            "the student has 2 and the teacher 1; choose blocks with --loss-layers",
        ),
        (lambda: {"chunk_size": 0}, "chunk_size"),
        (lambda: {"fp16": True}, "float16"),
    ],
)
def test_refusals(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        build_trainer(tmp_path, **change())


def test_a_student_cannot_be_its_own_teacher(tmp_path):
    model = prepare(tiny_llama(), CONFIG)
    with pytest.raises(ConfigError, match="shares its weights with the student"):
        build_trainer(tmp_path, student=model, teacher=model)


def test_a_softcapped_model_is_refused(tmp_path):
    model = prepare(tiny_llama(), CONFIG)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping changes the logits"):
        build_trainer(tmp_path, student=model, teacher=tiny_llama())
