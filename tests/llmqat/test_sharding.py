"""Trainings of two gloo processes, in shards (FSDP2) and in copies (DDP), against one process."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

import llmqat
from llmqat import cli
from llmqat.checkpoint import load
from llmqat.data import Record, RecordWriter
from llmqat.errors import ConfigError
from llmqat.train import QATTrainer, run, sharding
from tests.llmqat.processes import fsdp2_environment, launch
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.training import logged

pytestmark = pytest.mark.usefixtures("on_reference")
STEPS = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with a tied and with an own head, and records to train on."""
    root = tmp_path_factory.mktemp("sharding")
    for tied in (True, False):
        llmqat.save_pretrained(tiny_llama(tied=tied), root / ("tied" if tied else "untied"))
    # 80 sequences of 16: no variant has an uneven last batch, which would be filled up differently.
    with RecordWriter(root / "data", {"vocab_size": 128}, records=64) as writer:
        writer.write([Record(i, random_tokens(i, 1, 20)[0].numpy()) for i in range(64)])
    return root


def _argv(folders, output, batch, *more, model="tied", steps=STEPS):
    return [
        "train", "--model", str(folders / model), "--data", str(folders / "data"),
        "--output", str(output), "--bits", "4-8-4", "--lr", "1e-3", "--steps", str(steps),
        "--seq-len", "16", "--save-steps", "4", "--batch-size", str(batch), *more,
    ]  # fmt: skip


def _bytes(model):
    """(bytes in this process, bytes of the whole model, whether every parameter is a shard)."""
    parameters = list(model.parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    here = sum(p.numel() * p.element_size() for p in local)
    whole = sum(p.numel() * p.element_size() for p in parameters)
    return here, whole, all(isinstance(p, DTensor) for p in parameters)


def _train(argv, die_at=None):
    """A worker that trains and says how much of student and teacher it held at the end; rank 1
    kills itself before step `die_at`.
    """

    def work(rank):
        seen = []
        finish, step = run._finish, QATTrainer.training_step

        def watch(trainer, *rest):
            seen.extend(map(_bytes, (trainer.model, trainer.teacher)))
            finish(trainer, *rest)

        def training_step(trainer, *rest, **options):
            if rank == 1 and trainer.state.global_step + 1 == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer, *rest, **options)

        run._finish, QATTrainer.training_step = watch, training_step
        status = cli.main(argv)
        if status:
            raise SystemExit(status)
        return seen

    return work


def _assert_close(a, b):
    """The same run within rounding: every logged number, and the student (whose rounding AdamW
    enlarges where a gradient is all but zero). Rounding may take a value of one step over a tie to
    the next code.
    """
    assert len(logged(a)) == len(logged(b)) > 1
    flipped = []
    for one, other in zip(logged(a), logged(b), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
            if one[name] != pytest.approx(other[name], rel=1e-5):
                flipped.append(one["step"])
    assert len(set(flipped)) <= 1, flipped
    _assert_same_weights(a, b, atol=1e-4)


def _assert_same_weights(a, b, atol=0.0):
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol)


VARIANTS = {
    "tied": [],
    "blocks": ["--loss", "logits+hidden+attention"],
    "untied": ["--fused", "--kv-mode", "serving", "--loss", "label+logits", "--ste-clip", "2.0"],
    "checkpointed": ["--gradient-checkpointing", "--grad-accum", "2"],
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow][name == "tied" :]) for name in VARIANTS]
)
def test_shards_train_as_one_process(folders, tmp_path, variant):
    model, more = "untied" if variant == "untied" else "tied", VARIANTS[variant]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(_argv(folders, one, 2, *more, model=model)) == 0
    argv = _argv(folders, two, 1, *more, model=model)
    results = launch(_train(argv), environment=fsdp2_environment())
    for status, seen in results:
        assert status == 0, seen
        for here, whole, sharded in seen:  # student and teacher
            assert sharded
            assert 0.45 * whole < here < 0.55 * whole
    _assert_close(one, two)
    assert len(logged(two)) == STEPS
    record = json.loads((two / "llmqat_run.json").read_text())
    assert (record["status"], record["processes"]) == ("complete", 2)
    llmqat.from_pretrained(two)


def test_who_reads_the_weights(folders, tmp_path):
    """The first process, which sends shards out, or all: the same run, learned scales too."""
    environment = fsdp2_environment()
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"

    def work(rank):
        read, fill = [], load._fill
        load._fill = lambda model, *rest: (read.append(rank), fill(model, *rest))
        _train(argv)(rank)
        return read

    for lean, readers in (("true", [[0, 0], []]), ("false", [[0, 0], [1, 1]])):
        argv = _argv(folders, tmp_path / lean, 1, "--a-quantizer", "lsq", steps=4)
        given = {**environment, "FSDP_CPU_RAM_EFFICIENT_LOADING": lean}
        assert launch(work, environment=given) == [(0, read) for read in readers]
    assert logged(tmp_path / "true") == logged(tmp_path / "false")
    _assert_same_weights(tmp_path / "true", tmp_path / "false")


def test_a_killed_shard_resumes_with_the_same_numbers(folders, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = fsdp2_environment()
    argv = _argv(folders, whole, 1, steps=8)
    for status, seen in launch(_train(argv), environment=environment):
        assert status == 0, seen
    argv = _argv(folders, killed, 1, "--resume", steps=8)
    (first, _), (second, _) = launch(_train(argv, die_at=7), environment=environment)
    assert first == 1  # a lost partner is an error, said in one line
    assert second == -signal.SIGKILL
    for status, seen in launch(_train(argv), environment=environment):
        assert status == 0, seen
    assert logged(killed) == logged(whole)
    _assert_same_weights(killed, whole)


def test_copies_train_as_one_process(folders, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(_argv(folders, one, 2, model="untied", steps=8)) == 0
    for status, seen in launch(_train(_argv(folders, two, 1, model="untied", steps=8))):
        assert status == 0, seen
    _assert_close(one, two)


def test_another_number_of_processes_does_not_resume(folders, tmp_path, capsys):
    argv = _argv(folders, tmp_path, 1, "--resume")
    launch(_train(argv, die_at=3))
    assert cli.main(argv) == 1
    assert "resume with as many, not 1" in capsys.readouterr().err


def _accelerator(kind=DistributedType.FSDP, *, second=True, offload=None):
    plugin = SimpleNamespace(cpu_offload=offload)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=second, state=state)


def test_what_is_sharded():
    assert not sharding.is_sharded(_accelerator(DistributedType.MULTI_GPU))
    assert sharding.is_sharded(_accelerator())
    with pytest.raises(ConfigError, match="fsdp_version: 1"):
        sharding.is_sharded(_accelerator(second=False))
    with pytest.raises(ConfigError, match="fsdp_offload_params"):
        sharding.is_sharded(_accelerator(offload=CPUOffloadPolicy()))


def test_an_error_of_the_first_process_ends_all(folders, tmp_path):
    (tmp_path / "llmqat_run.json").write_text("{")
    argv = _argv(folders, tmp_path, 1, "--resume")
    assert [status for status, _ in launch(_train(argv))] == [1, 1]


def test_from_first_gives_everyone_the_same():
    def work(rank):
        PartialState(cpu=True)
        total = sharding.sum_over_processes(torch.tensor([rank, 10]))
        return sharding.from_first(lambda: os.getpid()), total.tolist(), sharding.is_first()

    results = launch(work)
    assert [status for status, _ in results] == [0, 0]
    values = [value for _, value in results]
    assert values[0][0] == values[1][0]
    assert [value[1:] for value in values] == [([1, 20], True), ([1, 20], False)]


def test_forgotten_codes_are_those_of_the_present_weight():
    model = llmqat.prepare(tiny_llama(), llmqat.QATConfig.parse("4-8-16"))
    linear = model.model.layers[0].mlp.up_proj
    kept = linear.weight_codes()[0]
    assert linear.weight_codes()[0] is kept
    sharding.forget_codes(model)
    assert linear.weight_codes()[0] is not kept
    linear.weight.data.neg_()  # behind autograd's back, as a gathered weight is written
    assert torch.equal(linear.weight_codes()[0], -kept)


LAUNCHED = {
    "FSDP with one process": {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "1"},
    "several processes and started one": {
        "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    },
}  # fmt: skip
"""What accelerate 1.15 tells its process: with `--num_processes 1`; and with `--cpu`, where it
leaves FSDP out.
"""


@pytest.mark.parametrize("message", LAUNCHED)
def test_a_launcher_that_starts_one_process_is_refused(
    folders, tmp_path, monkeypatch, capsys, message
):
    """It would train quietly on other batches than were asked for."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in LAUNCHED[message].items():
        monkeypatch.setenv(name, value)
    assert cli.main(_argv(folders, tmp_path / "out", 1)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_one_process_may_be_used(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    sharding.join(torch.device("cpu"))
    assert sharding.processes() == 1


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sharding.join(torch.device("cpu"))
    assert sharding.processes() == 1
    assert sharding.is_first()
    assert sharding.from_first(lambda: 3) == 3
