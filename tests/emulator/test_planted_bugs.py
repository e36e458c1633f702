"""The tests in the emulator notice bugs: each of the table ``planted/bugs.py``, planted in a copy
of the sources, makes the tests of its kernel fail."""

import json
import subprocess
import sys

import pytest

from tests.emulator.build import ROOT
from tests.emulator.planted.bugs import BUGS
from tests.emulator.planted.run import sound

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_text_to_change_is_there_once(bug):
    assert (ROOT / bug.file).read_text().count(bug.text) == 1
    assert bug.text != bug.replacement


def test_the_table():
    assert len(BUGS) >= 20
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    touched = {ROOT / bug.file for bug in BUGS}
    kernels = {p for p in (ROOT / "csrc/cuda").glob("*.cu") if "LLMQAT_KERNEL" in p.read_text()}
    assert not kernels - touched, "a kernel without a planted bug"


@pytest.fixture(scope="module")
def answers():
    """What became of each bug, by name."""
    command = [sys.executable, "-m", "tests.emulator.planted.run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_caught(answers, bug):
    answer = answers[bug.name]
    assert "error" not in answer, answer["error"]
    assert answer["failure"], "the tests passed"


@pytest.mark.slow
@pytest.mark.parametrize("check", sound(BUGS), ids=lambda check: check.name)
def test_the_same_tests_pass_without_it(answers, check):
    answer = answers[check.name]
    assert "error" not in answer, answer["error"]
    assert answer["failure"] is None
