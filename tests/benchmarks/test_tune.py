"""The tiles' sweep on cases without a device: what fails is left out, what is known is written."""

import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune
from benchmarks.cells import DeviceLost
from benchmarks.entry import Job, Shape
from llmqat_kernels.backends.triton import tiles

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tile:
    m: int
    num_warps: int


DEFAULT, FAST, BROKEN = Tile(128, 8), Tile(64, 4), Tile(32, 4)
CHOICES = {"matmul": (DEFAULT, FAST, BROKEN)}


class Case:
    """A case whose call asks for the tile of one bucket."""

    def __init__(self, rows, error=None):
        self.name, self.shape, self.dtype_name = "matmul", Shape("X", {"M": rows}), "float32"
        self.entry = SimpleNamespace(op="matmul")
        self._key, self._error = f"M<={rows}", error

    def build(self, device):
        if self._error is not None:
            raise self._error

        def call():
            tile = tiles.tile_for("matmul", self._key, 90, DEFAULT)
            if tile == BROKEN:
                raise RuntimeError("PassManager::run failed\nmore")
            call.last = tile
            return torch.ones(4)

        Case.call = call
        return Job(call, {}, lambda: None, None)


def timer(run):
    run()
    return 0.5 if Case.call.last == FAST else 1.0


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A table of this test with one bucket that is not measured again."""
    kept = {"tile": asdict(FAST)}
    content = {"arch": 90, "source": "measured", "tiles": {"matmul": {"M<=1": kept}}}
    monkeypatch.setattr(tiles, "table", lambda arch: content)
    monkeypatch.setattr(tune, "environment", lambda device: dict.fromkeys(ENVIRONMENT, "x"))
    return tmp_path / "sm_90.json"


ENVIRONMENT = ("processor", "triton", "torch", "commit")


def sweep(chosen, path):
    return tune.sweep(chosen, CPU, CHOICES, timer, 1, tune.writer(path, 90, CPU))


def written(path):
    return json.loads(path.read_text())["tiles"]["matmul"]


def test_a_candidate_that_raises_is_refused_and_the_others_are_timed(path):
    buckets, failed = sweep([Case(4)], path)
    assert not failed
    assert buckets["matmul", "M<=4"].refused == {
        BROKEN: "failed: RuntimeError: PassManager::run failed"
    }
    assert written(path)["M<=4"]["tile"] == asdict(FAST) and "M<=1" in written(path)


def test_a_case_that_raises_is_named_and_the_others_go_on(path, capsys):
    wrong = [Case(2, RuntimeError("CUDA out of memory")), Case(8, AssertionError("a\nb"))]
    buckets, failed = sweep([wrong[0], Case(4), wrong[1], Case(16)], path)
    assert failed and {key for _, key in buckets} == {"M<=4", "M<=16"}
    assert written(path).keys() == {"M<=1", "M<=4", "M<=16"}
    said = capsys.readouterr().err
    assert "matmul, X M=2, float32: failed: RuntimeError: CUDA out of memory" in said
    assert "matmul, X M=8, float32: gate failed: a b" in said


def test_every_bucket_is_on_disk_before_the_next_case(path):
    with pytest.raises(KeyboardInterrupt):
        sweep([Case(4), Case(8, KeyboardInterrupt())], path)
    assert written(path).keys() == {"M<=1", "M<=4"}


def test_a_budget_ends_the_sweep_with_the_command_for_the_rest(monkeypatch, path, capsys):
    clock = iter([0, 9, 11])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    write = tune.writer(path, 90, CPU)
    chosen = [Case(4), Case(8), Case(16), Case(32)]
    _, failed = tune.sweep(chosen, CPU, CHOICES, timer, 1, write, deadline=10)
    assert not failed and written(path).keys() == {"M<=1", "M<=4", "M<=8"}
    said = capsys.readouterr().out
    assert "2 cases left out; python -m benchmarks.tune --op matmul measures them" in said


def test_a_bucket_whose_cases_failed_keeps_what_was_known():
    before = {"arch": 90, "tiles": {"matmul": {"M<=4": {"tile": {}}}}}
    after = tune.merged(before, {("matmul", "M<=4"): tune.Bucket(DEFAULT)}, {})
    assert after["tiles"] == before["tiles"]


def test_a_device_that_does_not_answer_ends_the_sweep(monkeypatch, path):
    monkeypatch.setattr(tune.cuda, "responds", lambda device: False)
    with pytest.raises(DeviceLost, match="PassManager::run failed; run again without it"):
        sweep([Case(4), Case(8)], path)
