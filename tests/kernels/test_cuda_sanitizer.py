"""compute-sanitizer on the CUDA kernels: memcheck and racecheck find nothing in them, after each
has found a planted fault of its kind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda_cases import operators

ROOT = Path(__file__).resolve().parents[2]
FOUND = 42
"""Exit status for a reported fault."""
FAULTS = {"memcheck": "overrun", "racecheck": "race"}
SECONDS = 240

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def toolkit_program(name):
    """A program of the CUDA toolkit; skips the test if there is none."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    if compiler := shutil.which("nvcc"):
        folders.append(str(Path(compiler).resolve().parents[1]))
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{f}/bin" for f in folders)])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The program of planted_faults.cu, compiled for this device."""
    output = tmp_path_factory.mktemp("planted") / "faults"
    source = ROOT / "tests/kernels/planted_faults.cu"
    command = [
        toolkit_program("nvcc"),
        "-std=c++20",
        "-arch=native",
        str(source),
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True, timeout=SECONDS)
    return output


def sanitize(tool, *command):
    """The finished run of a program under a tool, with every allocation of torch its own."""
    program = [toolkit_program("compute-sanitizer"), "--tool", tool]
    options = ["--error-exitcode", str(FOUND), "--target-processes", "all"]
    done = subprocess.run(
        [*program, *options, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer refuses this device: Device not supported")
    return done


@pytest.mark.parametrize("tool", FAULTS)
def test_finds_a_planted_fault_and_none_in_our_kernels(planted, tool):
    right = sanitize(tool, planted, "right")
    assert right.returncode == 0, right.stdout + right.stderr
    wrong = sanitize(tool, planted, FAULTS[tool])
    assert wrong.returncode == FOUND, f"{tool} missed a planted fault:\n{wrong.stdout}"
    if not operators():
        pytest.skip("the native library has no CUDA operators")
    ours = sanitize(tool, sys.executable, "-m", "tests.kernels.cuda_cases")
    assert ours.returncode == 0, ours.stdout[-8000:] + ours.stderr[-4000:]
    assert f"calls of {len(operators())} operators" in ours.stdout
