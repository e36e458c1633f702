"""The tiles' sweep on cases without a device: what fails is left out, what is known is written."""

import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda, tune
from benchmarks.cells import DeviceLost
from benchmarks.entry import Cost, Job, Shape
from benchmarks.registry import Case as RegistryCase
from benchmarks.registry import cases
from llmqat_kernels.backends.triton import tiles
from tests.benchmarks.test_registry import small
from tests.conftest import select_backend

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
        self.entry, self.cost = SimpleNamespace(op="matmul"), Cost(100)
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


def times(candidates, rounds):
    """In the place of a device's: the fast tile takes half of the time."""
    found = {}
    for name, (call,) in candidates.items():
        call()
        found[name] = [0.5 if Case.call.last == FAST else 1.0] * rounds
    return found, dict.fromkeys(candidates, "graph")


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
    return tune.sweep(chosen, CPU, CHOICES, times, 1, tune.writer(path, 90, CPU))


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
    _, failed = tune.sweep(chosen, CPU, CHOICES, times, 1, write, deadline=10)
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


def test_cold_copies_of_every_case_are_timed(path, monkeypatch):
    """As many as `cuda.copies_for` says; the case was built once to be gated."""
    builds, seen = [], []

    def counted(candidates, rounds):
        seen.append({name: len(calls) for name, calls in candidates.items()})
        return {name: [1.0] for name in candidates}, dict.fromkeys(candidates, "events")

    monkeypatch.setattr(tune.cells, "copies_on", lambda device, traffic: traffic // 25)
    case = Case(4)
    build = case.build
    monkeypatch.setattr(case, "build", lambda device: builds.append(device) or build(device))
    timed = tune.case_or_reason(case, CPU, CHOICES, {}, counted, 1)
    assert seen == [{tune.DEFAULT: 4, "1": 4}] and len(builds) == 4
    assert timed == [("matmul", "M<=4", "events")]


@pytest.mark.triton
def test_the_entries_that_ask_for_a_tile_are_those_that_are_built():
    """Operators without candidates are not built, gated and left; none with candidates is missed.

    integer_group_matmul reads the CPU's layout here; tests/twin sweeps it.
    """
    choices = tune.candidates(90)
    first = {case.entry.op: case for case in cases(quick=True, device_type="cuda")}
    assert first.keys() >= set(tune.ASKING)
    asking = {"integer_group_matmul"}
    with select_backend("triton"):
        for op in first.keys() - asking:
            case = RegistryCase(first[op].entry, small(first[op].entry), first[op].dtype)
            job = case.build(CPU)
            with tiles.asked() as asked:
                job.call()
            if any(question.op in choices for question in asked):
                asking.add(op)
    assert asking == set(tune.ASKING)


def test_only_cases_that_ask_are_swept(monkeypatch, path, capsys):
    swept = []

    def sweep_(chosen, device, choices, times, rounds, write, deadline):
        swept.extend(chosen)
        assert times is cuda.times
        return {}, False

    monkeypatch.setattr(tune, "sweep", sweep_)
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    assert tune.main([]) == 0
    assert {case.entry.op for case in swept} == set(tune.ASKING)
    with pytest.raises(SystemExit):
        tune.main(["--op", "quantize"])
    assert "'repacked_matmul'" in capsys.readouterr().err
