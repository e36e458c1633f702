"""Every kernel once under AddressSanitizer and UndefinedBehaviorSanitizer: a short check of its own
tests, in a fork of a process that has the sanitizers loaded."""

import json
import os
import subprocess
import sys

import pytest

from tests.emulator.build import ROOT, compiler
from tests.emulator.planted.bugs import BUGS, Bug
from tests.emulator.planted.run import run

pytestmark = [pytest.mark.emulator, pytest.mark.slow]

FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# One short check for every kernel, by file.
CHECKS = {
    "test_quantize.py": "5-7-dtype0-forward or largest_value",
    "test_quantized_linear.py": "reads_nothing_beyond",
    "test_float_linear.py": "ratio_rule and 1-40-2100-1-dtype0",
    "test_repack_weight.py": "repack_is and 31-130",
    "test_int4_linear.py": "equal_spec and 8-65-1280-64-4 or any_layout and 80-3",
    "test_rope_quantize_append.py": "every_schedule and forward",
    "test_attention_decode.py": "places_outside",
}


BUG = next(bug for bug in BUGS if bug.name == "one row too many")


@pytest.fixture(scope="module")
def answers():
    """What became of each check, and of the bug, by name."""
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler: set CXX")
    asked = [*command, "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{command[0]} has no libasan.so")
    # Python and torch were not built with it: it must come first, and their leaks are not ours.
    # The kernels' stacks are their own; nothing is to be found after a return.
    options = "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator.test_sanitizers"],
        **{"cwd": ROOT, "env": os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("file", CHECKS)
def test_kernel_is_clean(answers, file):
    answer = answers[file]
    assert "error" not in answer, answer["error"]
    assert answer["failure"] is None


def test_every_kernel_is_checked():
    tests = {path.name for path in (ROOT / "tests/emulator").glob("test_*.py")}
    kernels = {f"test_{path.stem}.py" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert tests & kernels <= set(CHECKS) <= tests


def test_the_sanitizers_look(answers):
    """One row too many, planted, is an AddressSanitizer report that names the source line."""
    report = answers[BUG.name]["error"]
    assert "AddressSanitizer" in report and "quantize.cu:" in report, report


if __name__ == "__main__":
    checks = [Bug(file, "", "", "", (file, CHECKS[file])) for file in CHECKS]
    run([*checks, BUG], FLAGS.split())
