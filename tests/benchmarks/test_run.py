"""The runner: rows, ratios, the results file, failed gates and bad arguments."""

import csv
import dataclasses

import pytest
import torch

from benchmarks import roofline, run
from benchmarks.registry import cases
from benchmarks.roofline import Roofline
from benchmarks.timing import wall_seconds
from llmqat_kernels.errors import InvalidArgument

ROOF = Roofline({1: 1e9}, fp32=1e9, bf16=1e9, int8=1e9)
CASE = next(cases(["pack_int4"]))


@pytest.fixture
def small_roofline(monkeypatch):
    monkeypatch.setattr(roofline, "FOOTPRINTS", (2**14,))
    monkeypatch.setattr(roofline, "GEMM_SIZE", {"cpu": 64})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_hold_rates_and_the_median_of_paired_ratios():
    measured = {run.OURS: [1e-3, 2e-3, 1e-3], "eager": [2e-3, 8e-3, 1e-3]}
    ours, eager = run.rows_of(CASE, "cpu", measured, ROOF)
    assert ours["p50_us"] == "1000.00" and ours["gate"] == "passed"
    assert ours["gb_per_s"] == f"{CASE.cost.bytes / 1e-3 / 1e9:.2f}"
    assert float(ours["percent_of_bound"]) == round(100 * CASE.cost.bytes / 1e9 / 1e-3, 1)
    assert eager["ratio"] == "2.000" and eager["backend"] == ""
    line = run.table_line([ours, eager])
    assert "eager 2.00x" in line and line.count("|") == run.table_head().splitlines()[0].count("|")


def test_a_losing_ratio_is_printed():
    rows = run.rows_of(CASE, "cpu", {run.OURS: [1e-3], "eager": [1e-4]}, ROOF)
    assert "eager 0.10x" in run.table_line(rows)


def test_a_failed_gate_is_a_row_without_a_time():
    def build(*args):
        job = CASE.entry.build(*args)
        return dataclasses.replace(job, baselines={"wrong": lambda: job.call()[:1]})

    case = dataclasses.replace(CASE, entry=dataclasses.replace(CASE.entry, build=build))
    (row,) = run.run_case(case, torch.device("cpu"), wall_seconds, ROOF, 1, 1e-4)
    assert row["gate"].startswith("failed: wrong") and "p50_us" not in row
    line = run.table_line([row])
    assert "not timed" in line and line.count("|") == run.table_head().splitlines()[0].count("|")


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


def test_quick_records_nothing(small_roofline, tmp_path, capsys):
    assert run.main(["--op", "pack_int4", "--quick", "--results", str(tmp_path)]) == 0
    assert "% of bound" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_other_columns_are_not_mixed(tmp_path):
    (tmp_path / "cpu.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidArgument, match="other columns"):
        run.append(tmp_path / "cpu.csv", [{"op": "quantize"}])
    assert (tmp_path / "cpu.csv").read_text() == "a,b\n1,2\n"


def test_list_prints_every_row(capsys):
    assert run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list(cases()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "nonsense"], "has no entry"),
        (["--threads", "0"], "at least 1"),
        (["--clock", "cpu", "--threads", "2"], "--threads 1"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one"),
        ),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
