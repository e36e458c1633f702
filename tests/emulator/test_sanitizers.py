"""Every kernel once under AddressSanitizer and UndefinedBehaviorSanitizer: a short check of its own
tests, in a process that has the sanitizers loaded."""

import os
import subprocess
import sys

import pytest

from tests.emulator.build import ROOT, compiler
from tests.emulator.planted.bugs import BUGS
from tests.emulator.planted.run import plant

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


def run(arguments, **environment):
    """pytest in a process of its own; returns it when it has ended."""
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
    added = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options, "LLMQAT_EMULATOR_FLAGS": FLAGS}
    return subprocess.run(
        [sys.executable, *"-m pytest -sqx -p no:cacheprovider -p no:xdist".split(), *arguments],
        **{"cwd": ROOT, "env": os.environ | added | environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", CHECKS)
def test_kernel_is_clean(file):
    done = run(["-m", "not gpu", "-k", CHECKS[file], str(ROOT / "tests/emulator" / file)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_every_kernel_is_checked():
    tests = {path.name for path in (ROOT / "tests/emulator").glob("test_*.py")}
    kernels = {f"test_{path.stem}.py" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert tests & kernels <= set(CHECKS) <= tests


def test_the_sanitizers_look(tmp_path):
    """One row too many, planted, is an AddressSanitizer report that names the source line."""
    bug = next(b for b in BUGS if b.name == "one row too many")
    plant(bug, tmp_path / "tree")
    file, selection = bug.tests
    done = run(
        ["-k", selection, str(ROOT / "tests/emulator" / file)],
        LLMQAT_EMULATOR_TREE=str(tmp_path / "tree"),
    )
    assert done.returncode != 0
    report = done.stdout + done.stderr
    assert "AddressSanitizer" in report and "quantize.cu:" in report, report[-3000:]
