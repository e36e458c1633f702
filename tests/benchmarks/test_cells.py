"""Cells of a sweep: gates, candidates that cannot run, rows, the results file, the budget."""

import csv

import pytest
import torch

from benchmarks import cells
from benchmarks.cells import BASELINE, Candidate, Cell, Pool
from benchmarks.entry import Cost
from benchmarks.roofline import Roofline
from llmqat_kernels import current_backend
from llmqat_kernels.errors import InvalidArgument

CPU = torch.device("cpu")
ROOF = Roofline({1: 1e9}, fp32=1e10, bf16=2e10, int8=4e10)
COST = Cost(1000, 0, 4000)


def calls(count):
    return [lambda: None] * count


def wrong(call):
    raise AssertionError("rows: 3 differ\nsecond line")


def broken(count):
    raise ModuleNotFoundError("no", name="humming")


def test_a_candidate_that_fails_or_cannot_run_is_said_and_not_timed():
    found = {
        "cuda W4A8": Candidate(calls, COST),
        "cuda W8A8": Candidate(calls, COST, gate=wrong),
        "humming": Candidate(broken, COST, BASELINE),
    }
    measured = cells.measure(found, CPU, rounds=2, seconds=1e-5)
    assert set(measured.seconds) == {"cuda W4A8"} and len(measured.seconds["cuda W4A8"]) == 2
    assert measured.notes["cuda W8A8"] == "failed: rows: 3 differ second line"
    assert measured.notes["humming"] == "left out: not installed (humming)"
    rows = cells.rows_of("gemm", {"layer": "qkv", "M": 1}, found, measured, ROOF)
    assert [row["candidate"] for row in rows] == list(found)
    assert "p50_us" in rows[0] and "p50_us" not in rows[1]
    assert "not installed" in cells.text_of(rows)


def test_nothing_runs():
    measured = cells.measure({"humming": Candidate(broken, COST)}, CPU)
    assert not measured.seconds and "humming" in measured.notes


def test_on_a_gpu_every_candidate_has_copies_of_its_own_traffic(monkeypatch):
    """What surrounds the device: its cache and its events are given."""
    seen = {}

    def times(ready, rounds):
        seen.update({name: len(found) for name, found in ready.items()})
        return {name: [1.0] * rounds for name in ready}, dict.fromkeys(ready, "graph")

    monkeypatch.setattr(cells.cuda, "l2_bytes", lambda device: 1000)
    monkeypatch.setattr(cells.cuda, "times", times)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = {"small": Candidate(calls, Cost(500)), "large": Candidate(calls, Cost(10**6))}
    measured = cells.measure(found, torch.device("cuda"), 3)
    assert seen == {"small": 8, "large": 1} == measured.copies
    assert measured.timing == {"small": "graph", "large": "graph"}
    rows = cells.rows_of("gemm", {"M": 1}, found, measured, ROOF)
    assert [row["copies"] for row in rows] == [8, 1]


def test_a_device_that_does_not_answer_ends_the_sweep(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cells.cuda, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(cells.DeviceLost, match="--skip cuda"):
        cells.prepare({"cuda W4A8": Candidate(calls, COST)}, torch.device("cuda"))


def test_rows_hold_shares_and_the_ratio_to_the_best_baseline():
    found = {
        "ours": Candidate(calls, COST, gate=lambda call: None),
        "slow": Candidate(calls, COST, BASELINE),
        "fast": Candidate(calls, Cost(1000, 4000), BASELINE),
    }
    seconds = {"ours": [2e-6, 2e-6], "slow": [9e-6, 9e-6], "fast": [6e-6, 8e-6]}
    ours, slow, fast = cells.rows_of("gemm", {"M": 1}, found, Cell(seconds), ROOF)
    assert ours["ratio"] == "3.500" and "ratio" not in fast and slow["ratio"] == "0.778"
    assert ours["percent_of_copy"] == "50.0" and ours["percent_of_peak"] == "5.0"
    assert fast["percent_of_peak"] == "2.9" and fast["peak_gop_per_s"] == "20.0"
    assert ours["gate"] == "passed" and slow["gate"] == "" and ours["ops"] == 4000


def test_rows_are_written_after_every_cell(tmp_path, capsys):
    recorder = cells.Recorder("gemm", CPU, True, tmp_path)
    row = {"part": "gemm", "cell": "layer=o M=1", "candidate": "cuda", "gate": "failed: x"}
    recorder.add([row])
    recorder.add([row | {"cell": "layer=o M=2", "gate": "left out: y"}])
    with (tmp_path / "gemm_cpu.csv").open() as file:
        first, second = csv.DictReader(file)
    assert cells.parse_cell(first["cell"]) == {"layer": "o", "M": "1"}
    assert second["torch"] == torch.__version__ and second["time"]
    assert recorder.close() == 1 and "2 cells, 1 failed gates" in capsys.readouterr().out


def test_without_save_nothing_is_written(tmp_path):
    recorder = cells.Recorder("gemm", CPU, False, tmp_path)
    recorder.add([{"cell": "M=1", "candidate": "x", "gate": ""}])
    assert recorder.close() == 0 and not list(tmp_path.iterdir())


def test_a_pool_makes_each_copy_once_and_an_error_stays():
    made = []
    pool = Pool(lambda: made.append(0) or len(made))
    assert pool.take(2) == [1, 2] and pool.take(1) == [1] and pool.take(3) == [1, 2, 3]
    tries = []

    def fail():
        tries.append(0)
        raise ValueError("no")

    pool = Pool(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            pool.take(1)
    assert len(tries) == 1


def test_a_backend_holds_for_the_call_alone():
    before = current_backend()
    assert cells.with_backend("reference", current_backend)() == "reference"
    assert current_backend() == before


def test_the_budget_stops_and_says_what_is_left(capsys):
    assert list(cells.within(float("inf"), [1, 2, 3], "cells")) == [1, 2, 3]
    assert list(cells.within(-1.0, [1, 2, 3], "cells")) == []
    assert "3 cells left out" in capsys.readouterr().out


def test_skip_leaves_out_by_word():
    found = {"cuda W4A8": 1, "cuda W4A8 + quantize": 2, "triton W4A8": 3}
    assert list(cells.wanted(found, ["cuda"])) == ["triton W4A8"]
    assert list(cells.wanted(found, ["quantize"])) == ["cuda W4A8", "triton W4A8"]


def test_a_lost_device_is_one_line(capsys):
    def lost():
        raise cells.DeviceLost("cuda W4A8: illegal address; run again with --skip cuda")

    assert cells.guarded(lost) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_numbers_out_of_range():
    with pytest.raises(InvalidArgument, match="--rounds"):
        cells.check_arguments(type("Args", (), {"rounds": 0, "threads": 1}))
