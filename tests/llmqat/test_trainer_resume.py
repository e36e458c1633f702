"""QATTrainer resumes bit for bit where it was killed, whatever became of its checkpoints."""

import os
import shutil

import pytest
import torch
from transformers import TrainerCallback

from llmqat.checkpoint import from_pretrained
from llmqat.convert import state_of
from llmqat.errors import CheckpointError
from llmqat.train import resume
from tests.llmqat.training import (
    CONFIG,
    assert_same_state,
    build_trainer,
    logged,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("on_reference")


class _Stop(TrainerCallback):
    """Ends the process's work in the middle of a step, as a kill does: nothing after it is
    written.
    """

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            raise InterruptedError("killed")


# Just before and after a save, at an epoch's end (4 steps), at the last step, and before anything
# is saved.
@pytest.mark.parametrize("kills", [(2,), (4,), (5, 8), (9,), (10,)])
def test_resume_is_bit_identical(tmp_path, straight, kills):
    def trainer(*callbacks):
        return build_trainer(
            tmp_path,
            steps=10,
            data=token_rows(16),
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
            assert_same_state(*(torch.load(path, weights_only=True) for path in (mine, whole)))
        else:
            assert mine.read_bytes() == whole.read_bytes()
    assert logged(tmp_path) == logged(straight)
    assert len(logged(straight)) == 10


def test_resume_on_every_backend(tmp_path, backend):
    def trainer(folder, *callbacks):
        return build_trainer(folder, steps=6, callbacks=list(callbacks))

    trainer(tmp_path / "a").train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "b", _Stop(5)).train()
    trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    finals = [(tmp_path / run / "checkpoint-6" / "model.safetensors").read_bytes() for run in "ab"]
    assert finals[0] == finals[1]
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


def test_sparse_logging_resumes_bit_identically_too(tmp_path):
    def trainer(folder, *callbacks):
        return build_trainer(folder, steps=8, logging_steps=4, callbacks=list(callbacks))

    trainer(tmp_path / "a").train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "b", _Stop(5)).train()
    trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    # Logged where asked for, where health is due and where a checkpoint is written.
    assert [entry["step"] for entry in logged(tmp_path / "a")] == [2, 3, 4, 6, 8]


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
        build_trainer(tmp_path, steps=10, data=token_rows(16), gradient_accumulation_steps=2).train(
            True
        )
        assert logged(tmp_path) == logged(straight)


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
    build_trainer(tmp_path, steps=5, save_steps=1, save_total_limit=1).train()
    assert marked[1] == ["checkpoint-1", "checkpoint-2"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_checkpoint_is_a_prepared_model(straight):
    model = from_pretrained(straight / "checkpoint-9")
    assert state_of(model).config == CONFIG
    assert model.lm_head.weight is model.model.embed_tokens.weight
