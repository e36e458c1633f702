"""The runner: rows, ratios, the results file, failed gates and bad arguments."""

import csv
import dataclasses
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import records, roofline, run
from benchmarks.registry import cases
from benchmarks.roofline import Roofline
from benchmarks.timing import wall_seconds
from llmqat_kernels.errors import InvalidArgument

ROOF = Roofline({1: 1e9}, fp32=1e9, bf16=1e9, int8=1e9)
CPU = torch.device("cpu")
CASE = next(cases(["pack_int4"]))
BARS = records.table_head().splitlines()[0].count("|")


@pytest.fixture
def small_roofline(monkeypatch):
    monkeypatch.setattr(roofline, "FOOTPRINTS", {"cpu": (2**14,)})
    monkeypatch.setattr(roofline, "GEMM_SIZE", {"cpu": 64})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_hold_rates_and_the_median_of_paired_ratios():
    measured = {records.OURS: [1e-3, 2e-3, 1e-3], "eager": [2e-3, 8e-3, 1e-3]}
    ours, eager = run.rows_of(CASE, "cpu", run.Measured(measured), ROOF)
    assert "timing" not in ours and "copies" not in ours
    assert ours["p50_us"] == "1000.00" and ours["gate"] == "passed"
    assert ours["gb_per_s"] == f"{CASE.cost.bytes / 1e-3 / 1e9:.2f}"
    assert float(ours["percent_of_bound"]) == round(100 * CASE.cost.bytes / 1e9 / 1e-3, 1)
    assert eager["ratio"] == "2.000" and eager["backend"] == ""
    line = records.table_line([ours, eager])
    assert "eager 2.00x" in line and line.count("|") == records.table_head().splitlines()[0].count(
        "|"
    )


def test_a_losing_ratio_is_printed():
    measured = run.Measured({records.OURS: [1e-3], "eager": [1e-4]})
    rows = run.rows_of(CASE, "cpu", measured, ROOF)
    assert "eager 0.10x" in records.table_line(rows)


def test_a_gpu_row_says_how_it_was_timed_and_what_was_left_out():
    """Rows of what a GPU would have measured: the figures here are made up."""
    measured = run.Measured(
        {records.OURS: [1e-3], "eager": [2e-3]},
        {records.OURS: "graph", "eager": "events"},
        3,
        {records.OURS: 10, "eager": 100},
    )
    ours, eager = run.rows_of(CASE, "triton", measured, ROOF)
    assert (ours["timing"], ours["copies"], ours["peak_bytes"]) == ("graph", 3, 10)
    assert (eager["timing"], eager["peak_bytes"]) == ("events", 100)
    missing = {"candidate": "torchao", "gate": "left out: not installed"}
    line = records.table_line([ours, eager, missing])
    assert "eager 2.00x" in line and "torchao" not in line


def test_a_run_on_cuda_times_every_copy_of_the_inputs(monkeypatch):
    """What surrounds the device: its cache, memory and events are given."""
    seen = {}

    def times(candidates, rounds):
        seen.update({name: len(calls) for name, calls in candidates.items()})
        for calls in candidates.values():
            for call in calls:
                call()
        return {name: [1.0] * rounds for name in candidates}, dict.fromkeys(candidates, "graph")

    monkeypatch.setattr(run.cuda, "l2_bytes", lambda device: CASE.cost.bytes)
    monkeypatch.setattr(run.cuda, "peak_bytes", lambda call: 7)
    monkeypatch.setattr(run.cuda, "times", times)
    job = CASE.build(torch.device("cpu"))
    job = dataclasses.replace(job, baselines={"eager": job.call})
    measured = run.on_cuda(CASE, job, torch.device("cpu"), 2)
    assert seen == {records.OURS: 4, "eager": 4} and measured.copies == 4
    assert measured.peak == {records.OURS: 7, "eager": 7} and measured.timing["eager"] == "graph"


def test_a_budget_names_what_it_leaves_out(small_roofline, tmp_path, capsys):
    argv = ["--op", "pack_int4", "--quick", "--budget", "0", "--results", str(tmp_path)]
    assert run.main(argv) == 0
    assert "1 rows left out: pack_int4, SmolLM2 rows=1536 C=576" in capsys.readouterr().out


def test_a_failed_gate_is_a_row_without_a_time():
    def build(*args):
        job = CASE.entry.build(*args)
        return dataclasses.replace(job, baselines={"wrong": lambda: job.call()[:1]})

    case = dataclasses.replace(CASE, entry=dataclasses.replace(CASE.entry, build=build))
    (row,) = run.run_case(case, torch.device("cpu"), wall_seconds, ROOF, 1, 1e-4)
    assert row["gate"].startswith("failed: wrong") and "p50_us" not in row
    line = records.table_line([row])
    assert "not timed" in line and line.count("|") == records.table_head().splitlines()[0].count(
        "|"
    )


def test_a_run_appends_its_rows(small_roofline, tmp_path, capsys):
    argv = ["--op", "pack_int4", "unpack_int4", "--rounds", "1", "--results", str(tmp_path)]
    assert run.main(argv) == 0
    assert "appended" in capsys.readouterr().out
    first = (tmp_path / "cpu.csv").read_text()
    assert run.main(argv) == 0
    text = (tmp_path / "cpu.csv").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 2 * len(first.splitlines()) - 1
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["op"] for row in rows} == {"roofline", "pack_int4", "unpack_int4"}
    for row in rows:
        assert row["torch"] == torch.__version__ and row["time"] and row["threads"] == "1"
    assert all(row["ratio"] for row in rows if row["candidate"] == "eager")


def raising(case, error):
    """The case with a build that raises."""

    def build(*args):
        raise error

    return dataclasses.replace(case, entry=dataclasses.replace(case.entry, build=build))


def test_whatever_a_case_raises_is_a_row_and_the_others_go_on(
    small_roofline, monkeypatch, tmp_path, capsys
):
    first, *_, last = cases(["pack_int4", "unpack_int4"])
    error = RuntimeError("CUDA out of memory | 1\nsecond line")
    monkeypatch.setattr(run, "cases", lambda *_: [raising(first, error), last])
    assert run.main(["--rounds", "1", "--results", str(tmp_path)]) == 1
    line = capsys.readouterr().out.splitlines()
    assert any("gate failed: RuntimeError: CUDA out of memory / 1; not timed" in x for x in line)
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    bad, good, *_ = [row for row in rows if row["op"] != "roofline"]
    assert bad["gate"] == "failed: RuntimeError: CUDA out of memory | 1"
    assert (bad["op"], bad["p50_us"], bad["candidate"]) == ("pack_int4", "", records.OURS)
    assert bad["backend"] and bad["time"]
    assert (good["op"], good["gate"]) == ("unpack_int4", "passed") and float(good["p50_us"]) > 0


def test_rows_are_on_disk_after_every_case(small_roofline, monkeypatch, tmp_path):
    first, *_, last = cases(["pack_int4", "unpack_int4"])
    monkeypatch.setattr(run, "cases", lambda *_: [first, raising(last, KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        run.main(["--rounds", "1", "--results", str(tmp_path)])
    rows = csv.DictReader((tmp_path / "cpu.csv").open())
    assert {row["op"] for row in rows} == {"roofline", "pack_int4"}


HANGS = """
import dataclasses, sys, time
from benchmarks import roofline, run
from benchmarks.registry import cases
roofline.FOOTPRINTS, roofline.GEMM_SIZE = {"cpu": (2**14,)}, {"cpu": 64}
first, *_, last = cases(["pack_int4", "unpack_int4"])
entry = dataclasses.replace(last.entry, build=lambda *_: time.sleep(600))
run.cases = lambda *_: [first, dataclasses.replace(last, entry=entry)]
run.main(["--rounds", "1", "--results", sys.argv[1]])
"""


def test_a_run_that_is_ended_keeps_its_rows(tmp_path):
    path, until = tmp_path / "cpu.csv", time.monotonic() + 120
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)])
    try:
        while not (path.exists() and ",pack_int4," in path.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
    rows = list(csv.DictReader(path.open()))
    assert rows[-1]["op"] == "pack_int4" and [p.name for p in tmp_path.iterdir()] == ["cpu.csv"]


def test_a_device_that_does_not_answer_ends_the_run(monkeypatch, tmp_path, capsys):
    first, *_, last = cases(["pack_int4", "unpack_int4"])
    started = []

    def start(case):
        started.append(case)
        return run.attempt(raising(case, RuntimeError("illegal access")), CPU, *[None] * 4)

    monkeypatch.setattr(run.cuda, "responds", lambda device: False)
    record = records.Record(tmp_path / "cpu.csv", {})
    assert not run.run_cases([first, last], record, CPU, start, float("inf"))
    assert started == [first] and record.failed == 1 and record.close(CPU) == 1
    assert "does not answer after pack_int4" in capsys.readouterr().err


def test_the_first_shape_of_every_entry_comes_first_on_a_cpu():
    chosen = list(cases())
    ordered = run.most_important_first(chosen, "cpu")
    places = [case.entry.cpu.shapes.index(case.shape) for case in ordered]
    assert places == sorted(places) and len(ordered) == len(chosen)


def test_quick_records_nothing(small_roofline, tmp_path, capsys):
    assert run.main(["--op", "pack_int4", "--quick", "--results", str(tmp_path)]) == 0
    assert "% of bound" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_file_with_fewer_columns_gets_the_new_ones(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("time,op,ratio\n2026,quantize,2.0\n")
    records.append(path, [{"op": "dequantize", "driver": "1.2"}])
    old, new = csv.DictReader(path.read_text().splitlines())
    assert (old["op"], old["ratio"], old["driver"]) == ("quantize", "2.0", "")
    assert (new["op"], new["driver"]) == ("dequantize", "1.2")


def test_other_columns_are_not_mixed(tmp_path):
    (tmp_path / "cpu.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidArgument, match="other columns"):
        records.append(tmp_path / "cpu.csv", [{"op": "quantize"}])
    assert (tmp_path / "cpu.csv").read_text() == "a,b\n1,2\n"


def test_list_prints_every_row(capsys):
    assert run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list(cases()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_the_device_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--device", "cuda"])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and captured.out == ""
    assert captured.err.count("\n") == 1 and "no CUDA device" in captured.err


def test_list_of_a_gpu_needs_none(capsys):
    assert run.main(["--list", "--device", "cuda"]) == 0
    assert "W4A8, LLaMA-30B M=4096 N=17920 K=6656" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "nonsense"], "has no entry"),
        (["--threads", "0"], "at least 1"),
        (["--clock", "cpu", "--threads", "2"], "--threads 1"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
