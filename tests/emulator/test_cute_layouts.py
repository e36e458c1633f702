"""The emulator's fragments are those of CuTe, NVIDIA's own library of layouts.

CuTe says where each element of each register lies; matrices laid out so go through the emulator's
instructions and must come out multiplied, or moved.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.build import FAST, ROOT, Kernels, compile_library
from tests.emulator.test_instructions import SOURCE, call, encode

pytestmark = [pytest.mark.emulator, pytest.mark.slow]

PACKAGE = "nvidia-cutlass==4.2.0.0"
INSIDE = "cutlass_library/source/include"


def cute_headers(folder: Path) -> Path:
    """CuTe's headers: of the installed package, else of the wheel fetched into ``folder``."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]).parent / INSIDE
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run(
        [*command, "--dest", folder], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        pytest.skip(f"no CuTe headers: pip install --no-deps {PACKAGE}: {done.stderr.strip()}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith(INSIDE)])
    return folder / INSIDE


def nvcc() -> str:
    installed = sorted(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu1[3-9]/bin/nvcc"))
    found = os.environ.get("LLMQAT_NVCC") or shutil.which("nvcc") or next(iter(installed), None)
    if found is None:
        pytest.skip("no nvcc, whose headers CuTe needs")
    return str(found)


@pytest.fixture(scope="module")
def cute(tmp_path_factory):
    """``{"m16n8k32_s8.a": array[32 lanes, values] of indices, ...}``."""
    folder = tmp_path_factory.mktemp("cute")
    command = [nvcc(), "-x", "cu", "-std=c++20", "-I", str(cute_headers(folder))]
    source = ROOT / "tests/emulator/cute_layouts.cpp"
    subprocess.run([*command, str(source), "-o", str(folder / "layouts")], check=True)
    lines = subprocess.run([folder / "layouts"], capture_output=True, text=True, check=True).stdout
    rows = defaultdict(list)
    for line in lines.splitlines():
        name, _, _, index = line.split()
        rows[name].append(int(index))
    return {name: np.array(indices).reshape(32, -1) for name, indices in rows.items()}


@pytest.fixture(scope="module")
def library():
    return Kernels(compile_library(SOURCE, FAST))


def registers(values, bits):
    """[32, values] of ``bits`` each to [32, registers] words, value 0 low."""
    per_word = 32 // bits
    parts = (values.astype(np.int64) & ((1 << bits) - 1)).reshape(32, -1, per_word)
    return (parts << (bits * np.arange(per_word))).sum(-1).astype(np.uint32)


@pytest.mark.parametrize(
    "name, bits",
    [("m16n8k32_s8", 8), ("m16n8k64_s4", 4), ("m16n8k16_f16", 16), ("m16n8k16_bf16", 16)],
)
def test_mma(cute, library, name, bits):
    k = 256 // bits
    random = np.random.default_rng(bits)
    # Small integers: exact in every format, so the float kinds are exact too.
    a, b = random.integers(-7, 8, (16, k)), random.integers(-7, 8, (8, k))
    want = a @ b.T
    kind = name.rpartition("_")[2]
    if bits == 16:
        a, b = (encode(m.astype(np.float32), kind)[0] for m in (a, b))
    given = np.zeros((32, 16), np.uint32)
    given[:, :4] = registers(
        a.T.reshape(-1)[cute[f"{name}.a"]], bits
    )  # index = row + column * rows
    given[:, 4:6] = registers(b.T.reshape(-1)[cute[f"{name}.b"]], bits)
    out = call(library, name, given)[:, :4]
    got = out.view(np.float32).astype(np.int64) if bits == 16 else out.view(np.int32)
    assert np.array_equal(got, want.T.reshape(-1)[cute[f"{name}.acc"]])


@pytest.mark.parametrize("name, matrices", [("x4", 4), ("x2", 2), ("x4_trans", 4)])
def test_ldmatrix(cute, library, name, matrices):
    given = np.random.default_rng(3).integers(0, 2**32, (32, 16), dtype=np.uint32)
    given[:, 0] = np.random.default_rng(4).permutation(128)[:32] * 16  # each lane's row
    shared = given.view(np.uint16).reshape(-1)
    lanes = 8 * matrices
    rows = shared[given[:lanes, :1] // 2 + np.arange(8)]
    moved = np.zeros(lanes * 8, np.uint16)
    moved[cute[f"{name}.from"][:lanes]] = rows
    want = registers(moved[cute[f"{name}.to"]], 16)
    assert np.array_equal(call(library, f"probe_ldmatrix_{name}", given)[:, :matrices], want)
