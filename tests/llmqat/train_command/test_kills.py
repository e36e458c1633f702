"""`llmqat train` killed at any moment, again and again, ends with the same numbers."""

import os
import random
import shutil
import signal
import time

import pytest

import llmqat
from llmqat import cli, io
from llmqat.checkpoint import save
from llmqat.data import Record, RecordWriter
from llmqat.train import resume
from llmqat.train import run as training
from llmqat_kernels import use_backend
from tests.llmqat.processes import fork
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.training import logged

KILLS = 5


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """A function from an output folder to a command line."""
    root = tmp_path_factory.mktemp("kills")
    llmqat.save_pretrained(tiny_llama(tied=True), root / "model")
    with RecordWriter(root / "data", {"vocab_size": 128}, records=24) as writer:
        writer.write([Record(i, random_tokens(i, 1, 20)[0].numpy()) for i in range(24)])
    return lambda output: [
        "train", "--model", str(root / "model"), "--data", str(root / "data"),
        "--output", str(output), "--bits", "4-8-4", "--lr", "1e-3", "--steps", "9",
        "--batch-size", "2", "--seq-len", "16", "--save-steps", "2", "--resume",
    ]  # fmt: skip


def _train(argv):
    with use_backend("reference"):
        raise SystemExit(cli.main(argv))


def _syncs():
    """Count the calls that make a file durable, and kill this process at one of them."""
    counted = [0]
    sync, limit = os.fsync, [0]

    def fsync(fd):
        counted[0] += 1
        if counted[0] == limit[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(fd)

    os.fsync = fsync
    return counted, limit


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """(folder of an undisturbed run, its seconds, its durable writes)."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def work(_):
        counted, _ = _syncs()
        begin = time.monotonic()
        with use_backend("reference"):
            assert cli.main(argv(folder)) == 0
        return time.monotonic() - begin, counted[0]

    with fork(work) as run:
        seconds, writes = run.result()
    return folder, seconds, writes


def _assert_same(folder, other):
    assert logged(folder) == logged(other)
    assert len(logged(folder)) == 9
    names = ("model.safetensors", "checkpoint-9/optimizer.pt", "checkpoint-9/model.safetensors")
    for name in names:
        assert io.sha256_file(folder / name) == io.sha256_file(other / name), name
    assert resume.fault(folder / "checkpoint-9") is None


def test_killed_at_random_moments(argv, whole, tmp_path):
    reference, seconds, _ = whole
    draw, killed = random.Random(0), 0
    while True:
        with fork(lambda _: _train(argv(tmp_path))) as run:
            if killed < KILLS:
                run.process.join(draw.uniform(0, seconds))
                run.process.kill()
            status = run.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    _assert_same(tmp_path, reference)


def test_killed_after_the_last_step(argv, whole, tmp_path):
    """All checkpoints are written, the model is not: no step is trained again."""

    def work(_):
        training._finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        _train(argv(tmp_path))

    with fork(work) as process:
        assert process.wait() == -signal.SIGKILL
    assert len(logged(tmp_path)) == 9 and not (tmp_path / "model.safetensors").exists()
    with fork(lambda _: _train(argv(tmp_path))) as process:
        assert process.wait() == 0
    _assert_same(tmp_path, whole[0])


@pytest.mark.parametrize("moment", ["before the new folder", "before the rest of the old one"])
def test_killed_while_its_model_takes_its_place(argv, whole, tmp_path, moment):
    """The run lies in a hidden folder then; it is found, and no step is trained again."""
    folder, rename = tmp_path / "run", os.rename

    def work(_):
        def killed(source, target):
            if ".new-" in str(source):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        def keep(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "before the new folder":
            save.os.rename = killed
        else:
            save._keep_foreign = keep
        _train(argv(folder))

    with fork(work) as process:
        assert process.wait() == -signal.SIGKILL
    assert not (folder / training.RUN_FILE).exists() and len(save.interrupted(folder)) == 1

    def resumed(_):
        training.QATTrainer.training_step = None
        _train(argv(folder))

    with fork(resumed) as process:
        assert process.wait() == 0
    _assert_same(folder, whole[0])
    assert save.interrupted(folder) == []


def test_killed_between_two_durable_writes(argv, whole, tmp_path):
    reference, _, writes = whole
    draw = random.Random(1)
    for limit in (draw.randint(1, writes // KILLS) for _ in range(KILLS)):

        def work(_, limit=limit):
            _syncs()[1][0] = limit
            _train(argv(tmp_path))

        with fork(work) as run:
            assert run.wait() == -signal.SIGKILL
    with fork(lambda _: _train(argv(tmp_path))) as run:
        assert run.wait() == 0
    _assert_same(tmp_path, reference)


@pytest.mark.slow
def test_killed_once_at_every_durable_write(argv, whole, tmp_path):
    reference, _, writes = whole
    for limit in range(1, writes + 1):
        folder = tmp_path / str(limit)

        def work(_, limit=limit, folder=folder):
            _syncs()[1][0] = limit
            _train(argv(folder))

        with fork(work) as run:
            assert run.wait() == -signal.SIGKILL, limit
        with fork(lambda _, folder=folder: _train(argv(folder))) as run:
            assert run.wait() == 0, limit
        _assert_same(folder, reference)
        shutil.rmtree(folder)
