"""`llmqat train --resume`: the same numbers after an interruption, and refusals of other runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import llmqat
from llmqat import cli
from llmqat.train.metrics import read_metrics
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.train_command.command import VOCAB, copied, run_record, short_data, train_argv


def test_a_complete_run_is_left_alone(trained, model, data, capsys):
    before = (trained / "model.safetensors").stat().st_mtime_ns
    assert cli.main(train_argv(model, data, trained)) == 1
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert cli.main(train_argv(model, data, trained, "--resume")) == 0
    assert (trained / "model.safetensors").stat().st_mtime_ns == before


def test_killed_process_resumes_to_the_same_model(trained, model, data, tmp_path):
    """SIGKILL once the first checkpoint is complete, wherever the process is then."""
    output = tmp_path / "qat"
    code = "import sys, torch; torch.set_num_threads(1); import llmqat_kernels as qk; "
    code += "qk.use_backend('reference'); from llmqat.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *train_argv(model, data, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (output / "checkpoint-2" / "llmqat_complete.json").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cli.main(train_argv(model, data, output, "--resume")) == 0
    assert run_record(output)["status"] == "complete"
    final, whole = ((o / "model.safetensors").read_bytes() for o in (output, trained))
    assert final == whole
    losses = [[e["loss"] for e in read_metrics(o / "metrics.jsonl")] for o in (output, trained)]
    assert losses[0] == losses[1]


def test_interruption_before_anything_is_saved(model, data, tmp_path, monkeypatch):
    output = tmp_path / "qat"
    monkeypatch.setattr(llmqat.train.run.QATTrainer, "train", _interrupt)
    assert cli.main(train_argv(model, data, output)) == 130
    monkeypatch.undo()
    assert cli.main(train_argv(model, data, output, "--resume")) == 0


def _interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--lr", "2e-3"), "--lr: 0.002, but the run"),
        (("--bits", "4-8-8"), "--kv-bits: 8, but the run"),
        (("--seed", "1"), "--seed: 1, but the run"),
    ],
)
def test_resume_with_other_options(trained, model, data, capsys, change, message):
    assert cli.main(train_argv(model, data, trained, "--resume", *change)) == 1
    assert message in capsys.readouterr().err


def test_folders_may_move_between_a_run_and_its_resumption(trained, model, data, tmp_path):
    moved = (copied(folder, tmp_path, name) for folder, name in ((model, "m"), (data, "d")))
    assert cli.main(train_argv(*moved, trained, "--resume")) == 0


def test_another_model_of_the_same_name_is_refused(trained, model, data, tmp_path, capsys):
    other = copied(model, tmp_path, "m")
    llmqat.save_pretrained(tiny_llama(seed=5, tied=True, vocab=VOCAB), other)
    assert cli.main(train_argv(other, data, trained, "--resume")) == 1
    assert f"--model: {other} is not the one that the run" in capsys.readouterr().err
    assert cli.main(train_argv(model, data, trained, "--resume", "--teacher", str(other))) == 1
    assert f"--teacher: {other} is not the one that the run" in capsys.readouterr().err


def test_resume_with_other_steps_between_checkpoints(trained, model, data, tmp_path, monkeypatch):
    """Stopped after step 3: the rest is saved, logged and watched at other steps; same numbers."""
    output, step = tmp_path / "qat", llmqat.train.run.QATTrainer.training_step

    def stop(trainer, *rest, **options):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *rest, **options)

    monkeypatch.setattr(llmqat.train.run.QATTrainer, "training_step", stop)
    assert cli.main(train_argv(model, data, output)) == 130
    monkeypatch.undo()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    changed = ["--resume", "--save-steps", "5", "--log-steps", "3", "--health-steps", "0"]
    assert cli.main(train_argv(model, data, output, *changed)) == 0
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-5", "checkpoint-6",
    ]  # fmt: skip
    entries = read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 5, 6]
    assert "health/flipped" in entries[1] and "health/flipped" not in entries[3]
    for name in ("model.safetensors", "checkpoint-6/optimizer.pt"):
        assert (output / name).read_bytes() == (trained / name).read_bytes(), name


def test_damaged_or_missing_record(model, data, tmp_path, capsys):
    (tmp_path / "llmqat_run.json").write_text("{")
    assert cli.main(train_argv(model, data, tmp_path, "--resume")) == 1
    assert "llmqat_run.json is damaged" in capsys.readouterr().err
    (tmp_path / "llmqat_run.json").unlink()
    (tmp_path / "checkpoint-2").mkdir()
    assert cli.main(train_argv(model, data, tmp_path, "--resume")) == 1
    assert "has checkpoints but no llmqat_run.json" in capsys.readouterr().err


def test_changed_data(model, tmp_path, capsys):
    data = short_data(tmp_path)
    output = tmp_path / "out"
    assert cli.main(train_argv(model, data, output, "--steps", "1")) == 0
    record = run_record(output)
    (output / "llmqat_run.json").write_text(json.dumps({**record, "status": "running"}))
    data.write_text(json.dumps({"input_ids": list(range(2, 100))}) + "\n")
    assert cli.main(train_argv(model, data, output, "--steps", "1", "--resume")) == 1
    assert "has changed since the run began" in capsys.readouterr().err


def test_locked_output(model, data, tmp_path, capsys):
    from llmqat.io import Lock

    with Lock(tmp_path / ".llmqat-train.lock"):
        assert cli.main(train_argv(model, data, tmp_path)) == 1
    assert "being written by process" in capsys.readouterr().err
