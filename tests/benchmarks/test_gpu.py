"""What `make bench-gpu` runs: arguments, shares of the time, parts that fail or hang."""

import importlib
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part


def test_the_most_important_come_first_and_the_shares_fill_the_time():
    place = {part.name: index for index, part in enumerate(PARTS)}
    assert place["generate_data"] == len(PARTS) - 1
    # What makes every other figure worth reading does not depend on the longest part.
    assert max(place[name] for name in ("equality_cuda", "equality_triton")) < place["run"]
    assert sum(part.share for part in PARTS) == pytest.approx(1.0)
    assert len(place) == len(PARTS)


def test_the_part_with_most_rows_has_most_of_the_time():
    shares = {part.name: part.share for part in PARTS}
    assert max(shares, key=shares.__getitem__) == "run"
    assert gpu.SECONDS + gpu.REPORT_SECONDS <= 600
    seconds = gpu.SECONDS - gpu.REPORT_SECONDS
    assert all(part.share * seconds - gpu.GRACE / 2 > gpu.LEAST / 2 for part in PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_takes_its_arguments(part, capsys):
    module = importlib.import_module(f"benchmarks.{part.module or part.name}")
    with pytest.raises(SystemExit) as stop:
        module.main(part.argv("cuda", 30))
    assert stop.value.code == 1 and "no CUDA device" in capsys.readouterr().err


def test_parts_run_within_the_time_and_a_failure_stops_nothing(capsys):
    seen = []

    def start(command, timeout):
        seen.append((command[2], timeout))
        return {"a": 0, "b": 2, "c": None}[command[2].removeprefix("benchmarks.")]

    parts = [Part("a", 0.5, "first"), Part("b", 0.3, "second"), Part("c", 0.2, "third")]
    outcome = gpu.run_parts(parts, "cuda", 400.0, start)
    assert outcome == {
        "a": "done",
        "b": "exit status 2",
        "c": "ended by the clock; what it had written stays",
    }
    assert [name for name, _ in seen] == ["benchmarks.a", "benchmarks.b", "benchmarks.c"]
    assert all(timeout <= 400 for _, timeout in seen)
    assert "=== a: first (190 s) ===" in capsys.readouterr().out


def test_what_does_not_fit_is_named(capsys):
    parts = [Part("a", 0.5, "first"), Part("b", 0.5, "second")]
    outcome = gpu.run_parts(parts, "cuda", 10.0, lambda *_: 0)
    assert outcome == dict.fromkeys("ab", "left out: no time left")


def test_a_process_that_hangs_is_ended():
    assert gpu.run_process([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    assert gpu.run_process([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) is None


def test_the_command_sums_up(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "require_device", torch.device)
    monkeypatch.setattr(gpu, "run_parts", lambda *_: {"gemm": "done", "run": "exit status 1"})
    assert gpu.main(["--parts", "gemm", "run", "--no-report"]) == 1
    assert "gemm: done\nrun: exit status 1" in capsys.readouterr().out
