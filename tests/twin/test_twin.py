"""The flows of tests/device on a device that torch takes for a GPU, on a machine that has none."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.twin.flows import FLOWS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = HERE / "device.cpp"

pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built(),
    reason="this torch was built with CUDA",
)


@pytest.fixture(scope="module")
def device():
    """device.cpp as a library beside torch's."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256(f"{torch.__version__} {SOURCE.read_text()}".encode()).hexdigest()[:12]
    library = ROOT / "build" / "twin" / f"device-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = f"-std=c++20 -O1 -shared -fPIC -I{torch_folder}/include -L{torch_folder}/lib"
        rpath = f"-Wl,-rpath,{torch_folder}/lib"
        part = library.with_suffix(f".{os.getpid()}.tmp")
        command = ["c++", *flags.split(), rpath, SOURCE, "-lc10", "-ltorch_cpu", "-o", part]
        subprocess.run(command, check=True)
        part.replace(library)
    return library


@pytest.fixture(scope="module")
def errors(device):
    """Flow -> its error or None; a process of their own, since torch looks for a device once."""
    command = [sys.executable, "-m", "tests.twin.flows", str(device)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"flow"')]
    found = {entry["flow"]: entry["error"] for entry in map(json.loads, lines)}
    assert set(found) == set(FLOWS), done.stderr[-2000:]
    return found


@pytest.mark.parametrize("flow", FLOWS)
def test_flow(errors, flow):
    assert errors[flow] is None, errors[flow]
