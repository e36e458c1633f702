"""The bindings compile against the headers of the oldest torch that the package promises."""

import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
TARGET = re.search(r'TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text()).group(1)
BINDINGS = [
    path
    for path in ROOT.glob("csrc/bindings/*.cpp")
    if '#include "build_info.h"' not in path.read_text()
]


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """The include folder of that torch; its wheel is fetched once, and only headers are kept."""
    kept = ROOT / "build" / f"torch-{OLDEST}-headers"
    if not kept.exists():
        folder = tmp_path_factory.mktemp("torch")
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*fetch, f"torch=={OLDEST}.*"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"torch {OLDEST} cannot be fetched: {done.stderr.strip()[-200:]}")
        wheel = next(folder.glob("torch-*.whl"))
        with zipfile.ZipFile(wheel) as file:
            names = [name for name in file.namelist() if name.startswith("torch/include/")]
            file.extractall(folder / "unpacked", names)
        wheel.unlink()
        kept.parent.mkdir(exist_ok=True)
        shutil.move(folder / "unpacked", kept)
    return kept / "torch" / "include"


def test_the_build_targets_the_oldest_torch():
    major, minor = map(int, OLDEST.split("."))
    assert int(TARGET, 16) >> 48 == (major << 8) + minor


@pytest.mark.slow
def test_every_binding_compiles(headers, tmp_path):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    flags = f"-std=c++20 -Icsrc -Icsrc/include -DTORCH_TARGET_VERSION={TARGET}"
    command = [compiler, *flags.split(), "-isystem", headers]
    # Every binding includes it: read once, and torch's headers with it.
    common, precompiled = "csrc/bindings/checks.h", tmp_path / "checks.h.gch"
    subprocess.run([*command, "-x", "c++-header", common, "-o", precompiled], cwd=ROOT, check=True)
    command += ["-fsyntax-only", "-include", tmp_path / "checks.h"]

    def check(path):
        return subprocess.run([*command, path], cwd=ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        wrong = [done.stderr for done in pool.map(check, BINDINGS) if done.returncode]
    assert len(BINDINGS) > 10 and not wrong, "\n".join(wrong)
