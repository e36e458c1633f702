"""The build and the packages: install, editable install, sdist, no compiler, no torch, no driver.

Builds run on a copy of the source tree with the object cache of the real one, so that only what a
build changes is compiled again.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import setuptools

from llmqat_kernels import native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
USE = (
    "import sys, torch, llmqat_kernels as k\n"
    "from llmqat_kernels import native\n"
    "codes, scale = k.quantize(torch.tensor([[1.0, -2.0, 127.0]]), 8)\n"
    "assert codes.tolist() == [[1, -2, 127]] and scale.tolist() == [1.0]\n"
    "print(k.__file__, native.is_available(), native.why_not(), sep='|')\n"
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not beside the tests"
)


def run(command, cwd, check=True, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def tree(tmp_path):
    """A copy of what the packages are made of, without build products but with compiled objects."""
    root = tmp_path / "source"
    root.mkdir()
    for name in SOURCES:
        shutil.copy2(ROOT / name, root / name)
    clean = shutil.ignore_patterns("*.so", "*.tmp", "__pycache__", "lock")
    for folder in ("csrc", "llmqat", "llmqat_kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=clean)
    if (ROOT / "build/native").is_dir():
        shutil.copytree(ROOT / "build/native", root / "build/native", ignore=clean)
    return root


def pip(*arguments, python=sys.executable):
    return [sys.executable, "-m", "pip", "--python", python, *arguments]


def use(python, cwd, **environment):
    """Where the package lies, whether the library loads, why not."""
    return run([python, "-c", USE], cwd, **environment).stdout.strip().split("|")


def needs_library():
    if not native.is_available():
        pytest.skip(f"nothing to compare with: {native.why_not()}")


@pytest.mark.slow
def test_regular_install(tree, tmp_path):
    needs_library()
    target = tmp_path / "site"
    flags = ("--no-build-isolation", "--no-deps", "--target", target)
    run(pip("install", *flags, "."), tree, LLMQAT_FORCE_BUILD="1")
    file, available, _ = use(sys.executable, tmp_path, PYTHONPATH=str(target))
    assert Path(file).is_relative_to(target) and available == "True"
    files = {p.name for p in (target / "llmqat_kernels").iterdir()}
    assert "_native.abi3.so" in files and not (target / "csrc").exists()
    names = {p.name for p in target.iterdir() if p.suffix != ".dist-info"}
    assert names <= {"bin", "llmqat", "llmqat_kernels"}, "something else was installed"


@pytest.mark.slow
def test_editable_install(tree, tmp_path):
    needs_library()
    scratch = tmp_path / "venv"
    venv.create(scratch, with_pip=False, symlinks=True)
    site = next(scratch.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(str(Path(setuptools.__file__).parents[1]) + "\n")
    python = scratch / "bin/python"
    flags = ("--no-build-isolation", "--no-deps", "--editable")
    run(pip("install", *flags, ".", python=python), tree, LLMQAT_FORCE_BUILD="1")
    file, available, _ = use(python, tmp_path)
    assert Path(file).is_relative_to(tree) and available == "True"


def test_sdist_has_every_source(tree, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    name = run([sys.executable, "-c", code], tree).stdout.split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        files = {n.partition("/")[2] for n in archive.getnames()}
    for folder in ("csrc", "llmqat", "llmqat_kernels"):
        paths = (p for p in (tree / folder).rglob("*.*") if "__pycache__" not in p.parts)
        wanted = {str(p.relative_to(tree)) for p in paths}
        assert wanted and wanted <= files
    assert set(SOURCES) <= files
    assert not [f for f in files if f.endswith((".so", ".o", ".pyc")) or f.startswith("build/")]


def test_without_a_compiler_the_package_imports_and_says_why(tree, tmp_path):
    lib = tmp_path / "lib"
    bare = {"PATH": str(tmp_path), "CXX": "", "CUDA_HOME": "", "LLMQAT_NVCC": ""}
    build = [sys.executable, "setup.py", "build", "--build-lib", lib]
    summary = run(build, tree, **bare).stdout
    assert re.search(r"_native +left out: no C\+\+ compiler: install one of c\+\+, g\+\+", summary)
    assert not list(lib.rglob("*.so"))
    file, available, reason = use(sys.executable, tmp_path, PYTHONPATH=str(lib))
    assert Path(file).is_relative_to(lib) and available == "False"
    assert f"is not built: run `{native.BUILD_COMMAND}`" in reason
    forced = run(build, tree, check=False, LLMQAT_FORCE_BUILD="1", **bare)
    assert forced.returncode != 0 and "llmqat_kernels._native: no C++ compiler" in forced.stderr


def test_without_torch_or_pybind11_the_build_says_so(tree, tmp_path):
    scratch = tmp_path / "venv"
    venv.create(scratch, with_pip=False, symlinks=True)
    site = next(scratch.glob("lib/python*/site-packages"))
    outer = Path(setuptools.__file__).parents[1]
    for package in ("setuptools", "_distutils_hack"):
        (site / package).symlink_to(outer / package)
    build = [scratch / "bin/python", "setup.py", "build", "--build-lib", tmp_path / "lib"]
    summary = run(build, tree, LLMQAT_BUILD="cpu").stdout
    assert "left out: LLMQAT_BUILD=cpu" in summary
    if "no C++ compiler" in summary:
        pytest.skip("no compiler: the messages about torch cannot appear")
    assert re.search(r"_native +left out: torch is not importable", summary)
    assert re.search(r"_host +left out: pybind11 is not installed", summary)


def test_build_modes(tree, tmp_path):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    assert "left out: LLMQAT_BUILD=none" in run(build, tree, LLMQAT_BUILD="none").stdout
    wrong = run(build, tree, check=False, LLMQAT_BUILD="gpu")
    assert wrong.returncode != 0 and "choose one of auto, cpu, cuda, none" in wrong.stderr
    missing = run(build, tree, check=False, LLMQAT_BUILD="cuda", LLMQAT_NVCC=str(tmp_path / "nvcc"))
    assert missing.returncode != 0 and "nvcc" in missing.stderr


def test_unchanged_sources_are_not_compiled_again(tree, tmp_path):
    needs_library()
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    environment = {"LLMQAT_FORCE_BUILD": "1", "LLMQAT_VERBOSE": "1", "LLMQAT_BUILD": "cpu"}
    run(build, tree, **environment)
    assert " -c csrc/" not in run(build, tree, **environment).stdout
    header = tree / "csrc/cpu/rope_kernel.h"
    header.write_text(header.read_text() + "\n")
    compiled = set(re.findall(r" -c (csrc/\S+)", run(build, tree, **environment).stdout))
    assert compiled == {"csrc/cpu/rope.cpp"}


def library():
    needs_library()
    return next((ROOT / "llmqat_kernels").glob("_native*.so"))


def test_library_needs_no_driver_and_no_cuda_runtime():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    text = run(["readelf", "--dynamic", library()], ROOT).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", text))
    system = r"stdc\+\+|gcc_s|c|m|dl|rt|pthread"
    allowed = rf"(libtorch_cpu|libc10|lib({system})|ld-linux.*)\.so.*"
    assert {"libtorch_cpu.so", "libc10.so"} <= needed
    assert [n for n in needed if not re.fullmatch(allowed, n)] == []


def fat_binary_archs(data):
    """(kind, sm) of each entry of the library's CUDA fat binaries; kind 1 is PTX, 2 is SASS."""
    entries, at = set(), data.find(b"\x50\xed\x55\xba")
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + size
        while entry + 32 <= end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            if kind not in (1, 2) or entry_header < 32:
                break  # the next fat binary is found by its own magic number
            entries.add((kind, arch))
            entry += entry_header + payload
        at = data.find(b"\x50\xed\x55\xba", at + 4)
    return entries


def test_both_gpu_architectures_are_in_the_library():
    path = library()
    if native.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    assert native.build_info()["cuda_archs"] == ["sm_80", "sm_90"]
    assert {(2, 80), (2, 90), (1, 90)} <= fat_binary_archs(path.read_bytes())
