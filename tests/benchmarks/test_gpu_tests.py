"""The files that `make test-gpu` leaves: outcomes, reasons, a run that is interrupted."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_tests
from benchmarks.gpu_tests import Outcome

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_good(): pass

def test_bad(): assert 1 == 2, "one is\\nnot two"

@pytest.mark.parametrize("n", [1, 2])
def test_left_out(n): pytest.skip("needs a moon")

@pytest.mark.xfail(reason="known")
def test_known(): assert False

@pytest.fixture
def broken(): raise ValueError("no fixture")

def test_around(broken): pass
"""
SLEEPS = """
import time

def test_good(): pass

def test_long(): time.sleep(100)
"""


def command(folder, *options):
    return [
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "benchmarks.gpu_tests",
            "-p",
            "no:cacheprovider",
        ),
        *("-c", "/dev/null", "--rootdir", folder, "--gpu-results", folder / "out", *options),
        folder / "test_some.py",
    ]


def rows_of(folder):
    with (folder / "out" / "test_gpu.csv").open(newline="") as file:
        return {row["test"].partition("::")[2]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_run_leaves_a_table_and_a_summary(tmp_path, options):
    (tmp_path / "test_some.py").write_text(TESTS)
    done = subprocess.run(command(tmp_path, *options), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "test_gpu.csv and test_gpu.md: 6 tests" in done.stdout
    rows = rows_of(tmp_path)
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_left_out[1]": "skipped",
        "test_left_out[2]": "skipped",
        "test_known": "xfailed",
        "test_around": "error",
    }
    assert all(float(row["seconds"]) < 10 for row in rows.values())
    page = (tmp_path / "out" / "test_gpu.md").read_text()
    assert "1 error, 1 failed, 1 passed, 2 skipped, 1 xfailed" in page
    assert "::test_bad`: AssertionError: one is not two" in page
    assert "::test_around`: ValueError: no fixture" in page
    assert "- 2: needs a moon" in page and "- 1: known" in page
    assert "torch " in page and "interrupted" not in page


def test_a_run_that_is_interrupted_keeps_its_rows_and_says_so(tmp_path):
    (tmp_path / "test_some.py").write_text(SLEEPS)
    table, until = tmp_path / "out" / "test_gpu.csv", time.monotonic() + 60
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE)
    try:
        while not (table.exists() and "test_good" in table.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        assert not (tmp_path / "out" / "test_gpu.md").exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) not in gpu_tests.ENDED
    finally:
        process.kill()
        process.stdout.close()
    assert rows_of(tmp_path).keys() == {"test_good"}
    page = (tmp_path / "out" / "test_gpu.md").read_text()
    assert "1 passed" in page and "interrupted" in page


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "test_some.py").write_text("import nothing_of_this_name\n")
    subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True)
    page = (tmp_path / "out" / "test_gpu.md").read_text()
    assert "1 error" in page and "nothing_of_this_name" in page


def test_the_summary_names_the_device():
    where = {"processor": "Some GPU", "cuda": "13.0", "driver": "1.2", "commit": "abc"}
    page = gpu_tests.summary([Outcome("a")], where, 12.3, True)
    assert "`make test-gpu`: 1 passed, 12 s." in page
    assert "processor Some GPU, cuda 13.0, driver 1.2, commit abc." in page
    assert "no CUDA device" not in page and "Failures" not in page
    assert "no CUDA device" in gpu_tests.summary([], {"processor": "Some CPU"}, 0, True)


def test_the_command_writes_beside_the_other_results():
    recipe = (ROOT / "Makefile").read_text().partition("\ntest-gpu:")[2].partition("\n\n")[0]
    assert "-p benchmarks.gpu_tests --gpu-results benchmarks/results" in recipe
    assert "timeout --foreground --signal=INT" in recipe
