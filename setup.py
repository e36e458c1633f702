"""Builds the native library of llmqat_kernels, and nothing else (metadata: pyproject.toml).

Two files come out, both optional:

* ``llmqat_kernels/_native.abi3.so``: every operator, bound through torch's stable ABI (2.11).
  CPU sources need a C++20 compiler; CUDA sources are added when nvcc is found.
* ``llmqat_kernels/_host...so``: a pybind11 module with build facts and heuristics, without torch.

What cannot be built is left out, and the summary says why. Environment:

    LLMQAT_BUILD        auto (default) | cpu (no CUDA) | cuda (nvcc is a must) | none (Python only)
    LLMQAT_FORCE_BUILD  1: fail instead of leaving something out (nvcc is a must only with cuda)
    LLMQAT_NVCC, CUDA_HOME, CXX, MAX_JOBS
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/native")  # relative: no machine path gets into __FILE__ or debug strings
NATIVE, HOST = "llmqat_kernels._native", "llmqat_kernels._host"
HOST_SOURCE = "csrc/bindings/host_module.cpp"
INFO_SOURCE = "csrc/bindings/register.cpp"  # with HOST_SOURCE, the only one that sees build_info.h

TORCH_TARGET = "0x020b000000000000"  # 2.11: the oldest torch that this library loads into
CUDA_ARCHS = ("80", "90")  # SASS for A100 and H100, plus PTX of the last one
CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unused-parameter"
).split()
# GCC 12 warns of uninitialized values inside its own AVX-512 headers (gcc bug 105593).
GCC_FLAGS = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
NVCC_FLAGS = (
    "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
    " -Xptxas -warn-spills,-Werror -Werror all-warnings"
).split()
HOST_COMPILERS = ("c++", "g++", "clang++")


class Missing(RuntimeError):
    """Something that a part of the build needs is not on this machine."""


@dataclass(frozen=True)
class Torch:
    version: str
    root: Path


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    root: Path  # the toolkit: include/, lib or lib64


def run(command: list[str], what: str) -> str:
    """Runs a command in the source tree and returns its output; raises Missing if it fails."""
    if os.environ.get("LLMQAT_VERBOSE"):
        print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    except OSError as error:
        raise Missing(f"{what}: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise Missing(f"{what} failed ({done.returncode}): {shlex.join(command)}\n{output}")
    if done.stderr.strip():
        print(f"{what}:\n{done.stderr}", flush=True)
    return output


# ---- what is on this machine ----


def find_compiler() -> list[str]:
    """The C++ compiler as a command with its flags, able to compile C++20."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
    else:
        found = [path for name in HOST_COMPILERS if (path := shutil.which(name))]
        if not found:
            raise Missing(f"no C++ compiler: install one of {', '.join(HOST_COMPILERS)} or set CXX")
        command = [found[0]]
    run([*command, "-std=c++20", "-x", "c++", "-fsyntax-only", os.devnull], "C++20 check")
    is_clang = "clang" in run([*command, "--version"], "compiler version")
    return [*command, *CXX_FLAGS, *(() if is_clang else GCC_FLAGS)]


def find_torch() -> Torch:
    """The installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Missing(
            "torch is not importable: install torch >= 2.11, then use --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        raise Missing(f"torch {version} is too old: install torch >= 2.11")
    root = Path(spec.submodule_search_locations[0])
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise Missing(f"torch {version} comes without its C++ headers")
    return Torch(version, root)


def nvcc_candidates() -> Iterator[str]:
    if os.environ.get("LLMQAT_NVCC"):
        yield os.environ["LLMQAT_NVCC"]
        return
    if os.environ.get("CUDA_HOME"):
        yield str(Path(os.environ["CUDA_HOME"]) / "bin/nvcc")
    if path := shutil.which("nvcc"):
        yield path
    # The pip wheels nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm share one folder.
    for entry in sys.path:
        for path in sorted(Path(entry or ".").glob("nvidia/cu1[3-9]/bin/nvcc"), reverse=True):
            yield str(path)


def find_nvcc() -> Nvcc:
    problems = []
    for path in nvcc_candidates():
        try:
            if Path(path).is_file() and not os.access(path, os.X_OK):
                os.chmod(path, 0o755)  # some installers drop the mode bits of wheel contents
            version = re.search(r"release ([\d.]+)", run([path, "--version"], "nvcc"))
            # nvcc may be a wrapper script: it alone knows where its toolkit lies.
            top = re.search(r"#\$ TOP=(.+)", run_quiet([path, "--dryrun", "-x", "cu", os.devnull]))
            if version is None or top is None:
                raise Missing("no version or no toolkit folder in its output")
            nvcc = Nvcc(path, version[1], Path(os.path.normpath(top[1].strip())))
            cudart_static(nvcc)
            return nvcc
        except Missing as problem:
            problems.append(f"{path}: {problem}")
    raise Missing("; ".join(problems) or "no nvcc: set LLMQAT_NVCC or install nvidia-cuda-nvcc")


def run_quiet(command: list[str]) -> str:
    """Output of a command whose normal output goes to stderr."""
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    return done.stdout + done.stderr


def cudart_static(nvcc: Nvcc) -> Path:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (path := nvcc.root / folder / "libcudart_static.a").is_file():
            return path
    raise Missing(f"no libcudart_static.a under {nvcc.root} (wheel: nvidia-cuda-runtime)")


# ---- compiling ----


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def is_current(target: Path, depfile: Path) -> bool:
    """Whether target is newer than every file in its dependency list."""
    if not target.is_file() or not depfile.is_file():
        return False
    names = depfile.read_text().replace("\\\n", " ").partition(": ")[2].split()
    built = target.stat().st_mtime_ns
    return all((ROOT / n).is_file() and (ROOT / n).stat().st_mtime_ns < built for n in names)


def compile_object(command: list[str], source: str) -> Path:
    """Compiles one source unless its object is current; the flags are part of the object's name."""
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    target = BUILD / f"{source.replace('/', '-')}.{key}.o"
    depfile, partial = target.with_suffix(".d"), target.with_suffix(f".{os.getpid()}.tmp")
    if not is_current(ROOT / target, ROOT / depfile):
        try:
            out = ["-c", source, "-o", str(partial), "-MD", "-MF", str(depfile)]
            run([*command, *out], f"compile {source}")
            os.replace(ROOT / partial, ROOT / target)
        finally:
            (ROOT / partial).unlink(missing_ok=True)
    return target


def compile_all(jobs: list[tuple[list[str], str]]) -> list[str]:
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [str(p) for p in pool.map(lambda job: compile_object(*job), jobs)]


def link(command: list[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}.tmp")
    run([*command, "-o", str(partial)], f"link {output.name}")
    os.replace(partial, output)  # a process that has the old file mapped keeps it


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def info_include(cxx: list[str], torch: Torch | None, nvcc: Nvcc | None) -> list[str]:
    """Writes build_info.h (a JSON string) into a folder of its own; returns the -I flag."""
    info = {
        "compiler": run([cxx[0], "--version"], "compiler version").splitlines()[0],
        "cxx_flags": " ".join(cxx[1:]),
        "torch": torch.version if torch else None,
        "torch_target": "2.11",
        "cuda": nvcc.version if nvcc else None,
        "cuda_archs": [f"sm_{arch}" for arch in CUDA_ARCHS] if nvcc else [],
        "nvcc_flags": " ".join(NVCC_FLAGS) if nvcc else None,
        "isas": ["scalar", "avx2", "avx512vnni"],
    }
    text = json.dumps(info)
    folder = BUILD / f"info-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    header = f'#pragma once\n#define LLMQAT_BUILD_INFO R"json({text})json"\n'
    write_if_changed(ROOT / folder / "build_info.h", header)
    return ["-I", str(folder)]


def build_native(output: Path, nvcc: Nvcc | None) -> None:
    """CPU operators, bindings and, with nvcc, CUDA operators in one library without a PyInit."""
    cxx, torch = find_compiler(), find_torch()
    own = ["-Icsrc", "-Icsrc/include"]
    binding = [
        *(*cxx, *own, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"),
        *("-isystem", str(torch.root / "include")),
    ]
    jobs = [([*cxx, *own], source) for source in sources("csrc/cpu/*.cpp")]
    for source in sources("csrc/bindings/*.cpp"):
        if Path(source).name.startswith("cuda_"):
            jobs += [([*binding, "-DUSE_CUDA"], source)] if nvcc else []
        elif source == INFO_SOURCE:
            jobs.append(([*binding, *info_include(cxx, torch, nvcc)], source))
        elif source != HOST_SOURCE:
            jobs.append((binding, source))
    libraries = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-lc10"]
    if nvcc:
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        archs.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        cu = [nvcc.path, "-ccbin", cxx[0], *NVCC_FLAGS, *archs, *own]
        jobs += [(cu, source) for source in sources("csrc/cuda/*.cu")]
        # The runtime is linked in and calls the driver by dlopen: the library loads without either.
        libraries += [str(cudart_static(nvcc)), "-ldl", "-lrt", "-lpthread"]
    objects = compile_all(jobs)
    closed = ["-Wl,--exclude-libs,ALL", "-Wl,--no-undefined", "-Wl,--as-needed"]
    link([*cxx, "-shared", *objects, *closed, *libraries], output)


def build_host(output: Path, nvcc: Nvcc | None) -> None:
    """The pybind11 module: no torch header, no torch library."""
    if importlib.util.find_spec("pybind11") is None:
        raise Missing("pybind11 is not installed: pip install pybind11")
    import pybind11

    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        raise Missing(f"no Python.h in {include}: install the Python development headers")
    cxx = find_compiler()
    try:
        torch: Torch | None = find_torch()
    except Missing:
        torch = None
    flags = [*cxx, "-Icsrc", "-Icsrc/include", *info_include(cxx, torch, nvcc)]
    flags += ["-isystem", pybind11.get_include(), "-isystem", include]
    host_only = ["csrc/cpu/isa.cpp", HOST_SOURCE]
    link([*cxx, "-shared", *compile_all([(flags, source) for source in host_only])], output)


# ---- setuptools ----


@contextmanager
def build_lock() -> Iterator[None]:
    """One build at a time in one source tree."""
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    with open(ROOT / BUILD / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class BuildNative(build_ext):
    """Builds what this machine can build and reports the rest."""

    def build_extensions(self) -> None:
        mode = os.environ.get("LLMQAT_BUILD") or "auto"
        forced = os.environ.get("LLMQAT_FORCE_BUILD") == "1"
        if mode not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"LLMQAT_BUILD={mode}: choose one of auto, cpu, cuda, none")
        report: list[str] = []
        with build_lock():
            nvcc = self._nvcc(mode, forced, report)
            built = [e for e in self.extensions if self._attempt(e, mode, forced, nvcc, report)]
        self.extensions[:] = built
        print(
            "\nllmqat_kernels native build", *(f"  {line}" for line in report), sep="\n", flush=True
        )

    def _nvcc(self, mode: str, forced: bool, report: list[str]) -> Nvcc | None:
        if mode in ("cpu", "none"):
            report.append(f"cuda          left out: LLMQAT_BUILD={mode}")
            return None
        try:
            nvcc = find_nvcc()
        except Missing as problem:
            named = os.environ.get("LLMQAT_NVCC")
            if mode == "cuda" or (forced and named):
                raise SystemExit(f"llmqat_kernels: {problem}") from problem
            report.append(f"cuda          left out: {problem}")
            return None
        archs = " ".join(f"sm_{arch}" for arch in CUDA_ARCHS)
        report.append(f"cuda          nvcc {nvcc.version} for {archs}")
        return nvcc

    def _attempt(
        self, ext: Extension, mode: str, forced: bool, nvcc: Nvcc | None, report: list[str]
    ) -> bool:
        name = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name))
        build = build_native if ext.name == NATIVE else build_host
        try:
            if mode == "none":
                raise Missing("LLMQAT_BUILD=none")
            try:
                build(output.resolve(), nvcc)
            except Missing as problem:
                if nvcc is None or ext.name != NATIVE or mode == "cuda" or forced:
                    raise
                report.append(f"{name:<13} without CUDA, since with it: {problem}")
                build(output.resolve(), None)
        except Missing as problem:
            if mode != "none" and (forced or (mode == "cuda" and ext.name == NATIVE)):
                raise SystemExit(f"llmqat_kernels.{name}: {problem}") from problem
            output.unlink(missing_ok=True)  # never package an older build under a new version
            report.append(f"{name:<13} left out: {problem}")
            return False
        report.append(f"{name:<13} built: {output.name}")
        return True

    def copy_extensions_to_source(self) -> None:
        """Replaces in-place files in one step: another process may have the old one open."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build_py, ext)
            partial = f"{inplace}.{os.getpid()}.tmp"
            shutil.copyfile(regular, partial)
            os.replace(partial, inplace)


def extensions() -> list[Extension]:
    native = sources("csrc/cpu/*.cpp") + sources("csrc/bindings/*.cpp") + sources("csrc/cuda/*.cu")
    native.remove(HOST_SOURCE)
    return [Extension(NATIVE, native, py_limited_api=True), Extension(HOST, [HOST_SOURCE])]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
