"""QATTrainer: it learns, keeps its teacher, and resumes bit for bit where it was killed."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained
from llmqat.config import QATConfig
from llmqat.convert import prepare, state_of
from llmqat.errors import CheckpointError, ConfigError
from llmqat.train import QATTrainer, resume, training_arguments
from llmqat.train.losses import LOSSES, Loss
from llmqat.train.metrics import CURVE_COLUMNS, MetricsLog, read_metrics
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("4-8-4", kv_mode="serving")


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


def _data(count=24, length=24, seed=1):
    return [{"input_ids": row} for row in random_tokens(seed, count, length)]


def _trainer(folder, *, steps=8, student=None, teacher=None, data=None, config=CONFIG, **options):
    teacher = teacher or tiny_llama(tied=True)
    student = student or prepare(copy.deepcopy(teacher), config)
    named = {
        name: options.pop(name)
        for name in ("loss", "chunk_size", "health_steps", "callbacks")
        if name in options
    }
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_steps": 3}
    arguments = training_arguments(
        str(folder), max_steps=steps, use_cpu=True, disable_tqdm=True, **{**settings, **options}
    )
    data = data or _data()
    return QATTrainer(student, arguments, data, teacher=teacher, **{"health_steps": 2, **named})


def _losses(folder):
    """Everything logged except how long it took."""
    entries = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def _kl(student, teacher, ids):
    with torch.no_grad():
        p, q = (torch.log_softmax(m.eval()(ids).logits.double(), -1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _same_state(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same_state(x, y)
    else:
        assert a == b


def test_learns_and_leaves_the_teacher_alone(tmp_path):
    teacher = tiny_llama(heads=4, head_dim=32, tied=True)
    before = copy.deepcopy(teacher.state_dict())
    student = prepare(copy.deepcopy(teacher), QATConfig.parse("4-8-4", kv_mode="serving"))
    ids = random_tokens(9, 4, 48)
    first = _kl(student, teacher, ids)
    # A random model has nothing to generalise: it learns these four sequences, seen in every step.
    data = [{"input_ids": row} for row in ids] * 24
    trainer = _trainer(
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
    _same_state(dict(teacher.state_dict()), dict(before))
    assert state_of(teacher) is None
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module is teacher for module in trainer.model.modules())
    entries = _losses(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 25))
    assert entries[-1]["tokens"] == 24 * 4 * 48
    assert all("health/flipped" in entry for entry in entries if entry["step"] % 2 == 0)
    assert 0 < entries[1]["health/flipped"] < 0.5


class _Stop(TrainerCallback):
    """Ends the process's work in the middle of a step, as a kill does: nothing after it is
    written.
    """

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            raise InterruptedError("killed")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The whole run: two and a half epochs, with accumulation."""
    folder = tmp_path_factory.mktemp("straight")
    with qk.use_backend("reference"):
        _trainer(folder, steps=10, data=_data(16), gradient_accumulation_steps=2).train()
    return folder


# Just before and after a save, at an epoch's end (4 steps), at the last step, and before anything
# is saved.
@pytest.mark.parametrize("kills", [(2,), (4,), (5, 8), (9,), (10,)])
def test_resume_is_bit_identical(tmp_path, straight, kills):
    def trainer(*callbacks):
        return _trainer(
            tmp_path,
            steps=10,
            data=_data(16),
            gradient_accumulation_steps=2,
            callbacks=list(callbacks),
        )

    for kill in kills:
        with pytest.raises(InterruptedError):
            trainer(_Stop(kill)).train(resume_from_checkpoint=True)
    trainer().train(resume_from_checkpoint=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        mine, whole = (folder / "checkpoint-10" / name for folder in (tmp_path, straight))
        if name in ("optimizer.pt", "scheduler.pt"):
            _same_state(*(torch.load(path, weights_only=True) for path in (mine, whole)))
        else:
            assert mine.read_bytes() == whole.read_bytes()
    assert _losses(tmp_path) == _losses(straight)
    assert len(_losses(straight)) == 10


def test_resume_on_every_backend(tmp_path, backend):
    def trainer(folder, *callbacks):
        return _trainer(folder, steps=6, callbacks=list(callbacks))

    trainer(tmp_path / "a").train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "b", _Stop(5)).train()
    trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    finals = [(tmp_path / run / "checkpoint-6" / "model.safetensors").read_bytes() for run in "ab"]
    assert finals[0] == finals[1]
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")


def test_sparse_logging_resumes_bit_identically_too(tmp_path):
    def trainer(folder, *callbacks):
        return _trainer(folder, steps=8, logging_steps=4, callbacks=list(callbacks))

    trainer(tmp_path / "a").train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "b", _Stop(5)).train()
    trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    # Logged where asked for, where health is due and where a checkpoint is written.
    assert [entry["step"] for entry in _losses(tmp_path / "a")] == [2, 3, 4, 6, 8]


def _damage_truncated(folder):
    os.truncate(folder / "optimizer.pt", 100)


def _damage_flipped(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _damage_missing(folder):
    (folder / "scheduler.pt").unlink()


def _damage_unmarked(folder):
    (folder / resume.MARKER).unlink()


def _damage_marker(folder):
    (folder / resume.MARKER).write_text('{"format": 1, "files"')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_damage_truncated, "optimizer.pt has 100 bytes"),
        (_damage_flipped, "model.safetensors was altered"),
        (_damage_missing, "scheduler.pt is missing"),
        (_damage_unmarked, "never completed"),
        (_damage_marker, "is damaged"),
    ],
)
def test_a_torn_checkpoint_is_set_aside(tmp_path, straight, caplog, damage, reason):
    for name in ("checkpoint-6", "checkpoint-9", "metrics.jsonl"):
        source = straight / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    damage(tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError, match=f"checkpoint-9.*{reason}"):
        resume.complete_or_raise(tmp_path / "checkpoint-9")
    assert resume.newest_complete(tmp_path) == tmp_path / "checkpoint-6"
    assert reason in caplog.text
    assert (tmp_path / "torn-checkpoint-9").is_dir()
    if damage is _damage_flipped:
        _trainer(tmp_path, steps=10, data=_data(16), gradient_accumulation_steps=2).train(True)
        assert _losses(tmp_path) == _losses(straight)


def test_no_checkpoint_at_all(tmp_path):
    assert resume.newest_complete(tmp_path) is None
    assert resume.newest_complete(tmp_path / "missing") is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "torn-checkpoint-3").mkdir()
    assert resume.newest_complete(tmp_path) is None
    assert (tmp_path / "torn-checkpoint-3-2").is_dir()


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    marked = []
    mark = resume.mark_complete

    def spy(folder, step):
        marked.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        mark(folder, step)

    monkeypatch.setattr(resume, "mark_complete", spy)
    _trainer(tmp_path, steps=5, save_steps=1, save_total_limit=1).train()
    assert marked[1] == ["checkpoint-1", "checkpoint-2"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_checkpoint_is_a_prepared_model(straight):
    model = from_pretrained(straight / "checkpoint-9")
    assert state_of(model).config == CONFIG
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_accumulation_equals_a_large_batch(tmp_path):
    """The same eight sequences as one batch and as four: equal up to the rounding of sums."""
    finals = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = _trainer(
            tmp_path / str(batch),
            steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        finals.append((_losses(tmp_path / str(batch)), trainer.model.state_dict()))
    for one, four in zip(*(losses for losses, _ in finals), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-2)
        assert one["tokens"] == four["tokens"]


@pytest.mark.parametrize("config", [CONFIG, QATConfig.parse("4-8-8", ste_clip=2.0)])
def test_gradient_checkpointing_changes_nothing(tmp_path, config):
    for name in ("off", "on"):
        _trainer(
            tmp_path / name, steps=3, config=config, gradient_checkpointing=name == "on"
        ).train()
    assert _losses(tmp_path / "on") == _losses(tmp_path / "off")


def test_bf16_autocast_keeps_fp32_masters(tmp_path):
    teacher = tiny_llama(tied=True)
    student = prepare(copy.deepcopy(teacher), CONFIG)
    half = copy.deepcopy(teacher).bfloat16()
    _trainer(tmp_path / "bf16", steps=4, student=student, teacher=half, bf16=True).train()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    _trainer(tmp_path / "fp32", steps=4).train()
    for one, other in zip(_losses(tmp_path / "bf16"), _losses(tmp_path / "fp32"), strict=True):
        assert one["loss"] != other["loss"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.03)


def test_chunks_do_not_change_the_run(tmp_path):
    for chunk in (7, 1024):
        _trainer(tmp_path / str(chunk), steps=3, chunk_size=chunk).train()
    for one, other in zip(_losses(tmp_path / "7"), _losses(tmp_path / "1024"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_padding_does_not_count(tmp_path):
    ids = random_tokens(5, 1, 16)[0]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(8, dtype=torch.int64)]),
        "attention_mask": torch.tensor([1] * 16 + [0] * 8),
    }
    trainer = _trainer(tmp_path, data=[{"input_ids": ids}])
    for loss in ("logits", "label"):
        trainer.loss = LOSSES[loss]
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
    trainer = QATTrainer(student, arguments, _data(), loss="label", health_steps=0)
    trainer.train()
    assert trainer.teacher is None
    assert not any(key.startswith("health") for entry in _losses(tmp_path) for key in entry)


def test_a_diverged_run_stops_before_it_saves(tmp_path, monkeypatch):
    nan = Loss("logits", lambda x: x.student_hidden.sum() * float("nan"), needs_teacher=True)
    monkeypatch.setitem(LOSSES, "logits", nan)
    with pytest.raises(RuntimeError, match="loss is nan at step 1; lower the learning rate"):
        _trainer(tmp_path, save_steps=1).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_defaults_are_the_papers(tmp_path):
    arguments = training_arguments(str(tmp_path), use_cpu=True)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.warmup_steps) == (2e-5, 0, 0)
    assert (arguments.lr_scheduler_type, arguments.optim) == ("cosine", "adamw_torch_fused")
    assert (arguments.num_train_epochs, arguments.max_grad_norm, arguments.seed) == (1, 1, 42)
    trainer = QATTrainer(
        prepare(tiny_llama(), CONFIG), arguments, _data(), teacher=tiny_llama(seed=1)
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
    assert float(lines[4].split(",")[2]) == _losses(straight)[3]["loss"]


def _headless():
    model = tiny_llama()
    model.lm_head = nn.Sequential(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"student": prepare(tiny_llama(), CONFIG).bfloat16()}, "is bfloat16.*in float32"),
        (lambda: {"student": _headless()}, "student: .* has no plain linear head"),
        (lambda: {"teacher": _headless(), "student": tiny_llama()}, "teacher: .* no plain linear"),
        (lambda: {"teacher": tiny_llama(vocab=64), "student": tiny_llama()}, "vocabulary of 64"),
        (lambda: {"loss": "hidden"}, "loss: 'hidden' is unknown"),
        (lambda: {"chunk_size": 0}, "chunk_size"),
        (lambda: {"fp16": True}, "float16"),
    ],
)
def test_refusals(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        _trainer(tmp_path, **change())


def test_a_student_cannot_be_its_own_teacher(tmp_path):
    model = prepare(tiny_llama(), CONFIG)
    with pytest.raises(ConfigError, match="shares its weights with the student"):
        _trainer(tmp_path, student=model, teacher=model)


def test_a_softcapped_model_is_refused(tmp_path):
    model = prepare(tiny_llama(), CONFIG)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping changes the logits"):
        _trainer(tmp_path, student=model, teacher=tiny_llama())
