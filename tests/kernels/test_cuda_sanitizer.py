"""compute-sanitizer on the CUDA kernels: memcheck and racecheck find nothing in them, after each
has found a planted fault of its kind."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda_cases import operators

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests/kernels/planted_faults.cu"
FOUND = 42
"""Exit status for a reported fault."""
FAULTS = {"memcheck": "overrun", "racecheck": "race"}
SECONDS = 240
WHEELS = {"nvcc": "nvidia-cuda-nvcc", "compute-sanitizer": "nvidia-cuda-sanitizer-api"}

on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def toolkit_folders():
    """Where programs of a CUDA toolkit may lie: an installed one, then that of pip's wheels."""
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    if compiler := shutil.which("nvcc"):
        yield from (Path(compiler).parent, toolkit_of(compiler) / "bin")
    for entry in sys.path:
        yield from sorted(Path(entry or ".").glob("nvidia/*/bin"), reverse=True)


def toolkit_of(nvcc):
    """The folder of the toolkit: nvcc may be a script that calls another one."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"#\$ TOP=(.+)", done.stdout + done.stderr)
    return Path(os.path.normpath(top[1].strip())) if top else Path(nvcc).resolve().parents[1]


def toolkit_program(name):
    """A program of the CUDA toolkit; skips the test if there is none, and says what that means."""
    for folder in toolkit_folders():
        if (path := folder / name).is_file():
            if not os.access(path, os.X_OK):
                path.chmod(0o755)  # some installers drop the mode bits of wheel contents
            return str(path)
    pytest.skip(
        f"NOT CHECKED by compute-sanitizer: no {name} here. Install the CUDA toolkit and set"
        f" CUDA_HOME, or pip install the wheel {WHEELS[name]} of the driver's CUDA version"
    )


def compile_planted(arch, output):
    """The program of planted_faults.cu for one architecture."""
    nvcc = toolkit_program("nvcc")
    # Wheels have lib, where nvcc looks for lib64.
    library = f"-L{toolkit_of(nvcc) / 'lib'}"
    command = [nvcc, "-std=c++20", f"-arch={arch}", library, str(SOURCE), "-o", str(output)]
    subprocess.run(command, check=True, timeout=SECONDS)
    return output


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The planted faults, compiled for this device."""
    major, minor = torch.cuda.get_device_capability()
    return compile_planted(f"sm_{major}{minor}", tmp_path_factory.mktemp("planted") / "faults")


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
        pytest.skip("NOT CHECKED: compute-sanitizer refuses this device: Device not supported")
    return done


@pytest.mark.gpu
@on_device
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


# ---- what can be seen without a device ----


def test_programs_of_wheels_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages/nvidia/cu13/bin"
    folder.mkdir(parents=True)
    for name in WHEELS:
        (folder / name).write_text("#!/bin/sh\n")  # without the mode bits of a program
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.syspath_prepend(folder.parents[2])
    for name in WHEELS:
        assert toolkit_program(name) == str(folder / name) and os.access(folder / name, os.X_OK)


def test_a_missing_program_is_a_loud_skip(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(pytest.skip.Exception, match=r"NOT CHECKED.*nvidia-cuda-sanitizer-api"):
        toolkit_program("compute-sanitizer")


def test_the_planted_faults_compile(tmp_path):
    done = subprocess.run(
        [compile_planted("sm_80", tmp_path / "faults"), "right"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("right: ")
