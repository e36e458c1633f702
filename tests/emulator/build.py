"""Compiles CUDA sources for the CPU with the emulator's headers and loads them.

``compile_kernel("quantize")`` builds ``tests/emulator/quantize.cpp``, which includes the ``.cu``
file. Libraries are kept in ``build/emulator`` under a hash of the flags and of every file that went
into them, so a test compiles only what changed.

The environment tells ``compile_kernel`` to take other sources (``LLMQAT_EMULATOR_TREE``: bugs are
planted in a copy) or other flags (``LLMQAT_EMULATOR_FLAGS``: sanitizers).
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.emulator.memory import guarded_pages

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"
HEADERS = ROOT / "tests" / "emulator" / "standard_library.h"
# What emulated/block.h calls them, in the order of its enum.
SCHEDULES = ("forward", "reverse", "shuffled", "greedy", "lagging")

# Signed overflow is checked: a 32-bit index that overflows is a fault, not a wrong address.
FLAGS = (
    "-std=c++20 -ffp-contract=off -fPIC -shared -DLLMQAT_EMULATED"
    " -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter"
).split()
FAST = (
    "-O2 -fsanitize=alignment,bounds,shift,signed-integer-overflow"
    " -fsanitize-undefined-trap-on-error"
).split()
# Used where the compiler knows them. Local variables that a kernel does not set are 0xFE bytes; the
# variables of two libraries stay apart (GCC would share inline ones over the whole process).
OPTIONAL = ("-ftrivial-auto-var-init=pattern", "-fno-gnu-unique")


class EmulatorError(RuntimeError):
    """A kernel did what a device forbids; the message names the block and the thread."""


class Kernels(ctypes.CDLL):
    """A library whose functions raise :class:`EmulatorError` when the emulator found a fault."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._take_error = ctypes.CDLL.__getitem__(self, "emulator_take_error")
        self._take_error.restype = ctypes.c_char_p
        self._set_schedule = ctypes.CDLL.__getitem__(self, "emulator_set_schedule")
        self._set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint]

    def __getitem__(self, name):
        function = super().__getitem__(name)
        function.errcheck = self._check
        return function

    def _check(self, result, function, arguments):
        message = self._take_error().decode()
        if message:
            raise EmulatorError(message)
        return result

    def hide_memory(self, hide: bool = True) -> None:
        """From now on guarded tensors cannot be touched by a block until all its threads have
        waited for the launches before it (``griddepcontrol_wait``).
        """
        ctypes.CDLL.__getitem__(self, "emulator_hide")(_list_hidden if hide else None)

    def take_launches(self) -> int:
        """How many grids were begun since the last call."""
        return ctypes.CDLL.__getitem__(self, "emulator_take_launches")()

    def use_schedule(self, name: str, seed: int = 1) -> None:
        """The order of threads and blocks from now on, one of ``SCHEDULES``."""
        self._set_schedule(SCHEDULES.index(name), seed)


@ctypes.CFUNCTYPE(ctypes.c_void_p)
def _list_hidden():
    """For the emulator: pairs of address and bytes, ended by a 0."""
    global _hidden
    numbers = [number for pages in guarded_pages() for number in pages]
    _hidden = (ctypes.c_uint64 * (len(numbers) + 1))(*numbers, 0)
    return ctypes.addressof(_hidden)


@functools.cache
def compiler() -> list[str] | None:
    """The C++ compiler as a command, or None."""
    command = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    return shlex.split(command) if command else None


@functools.cache
def _accepts(flag: str) -> bool:
    command = [*compiler(), flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compile_library(source: Path, flags: list[str], root: Path = ROOT, cache: Path = CACHE) -> Path:
    """Compile ``source`` against the tree ``root`` into a library, unless it is in the cache.

    Skips the test where there is no compiler; raises RuntimeError with its output if it fails.
    """
    include = [f"-I{root / name}" for name in ("csrc", "csrc/include", "tests/emulator")]
    return _compile("c++", source, [*flags, *include], ".so", cache)


def precompiled(flags: list[str]) -> list[str]:
    """``flags`` and those that include the standard library's headers, compiled once.

    Reading them takes a third of a compilation at -O0. A source that forgets to include one is
    noticed without.
    """
    header = _compile("c++-header", HEADERS, flags, ".h.gch", CACHE)
    return [*flags, "-include", str(header.with_suffix(""))]


def _compile(language: str, source: Path, flags: list[str], suffix: str, cache: Path) -> Path:
    """The product of ``source``, from the cache or put there."""
    if compiler() is None:
        pytest.skip("no C++ compiler: set CXX")
    optional = [flag for flag in OPTIONAL if _accepts(flag)]
    command = [*compiler(), "-x", language, *FLAGS, *optional, *flags, str(source)]
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    depfile = cache / f"{source.stem}-{key}.d"
    if depfile.is_file():
        digest = _digest(key, depfile)
        product = cache / f"{source.stem}-{digest}{suffix}"
        if digest is not None and product.is_file():
            return product
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        output, listed = Path(folder) / "product", Path(folder) / "files.d"
        done = subprocess.run(
            [*command, "-o", str(output), "-MD", "-MF", str(listed)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        product = cache / f"{source.stem}-{_digest(key, listed)}{suffix}"
        os.replace(output, product)
        os.replace(listed, depfile)
    return product


def _digest(key: str, depfile: Path) -> str | None:
    """A hash of the contents of the files that went into a product; None if one is gone."""
    names = depfile.read_text().replace("\\\n", " ").partition(": ")[2].split()
    digest = hashlib.sha256(key.encode())
    for name in names:
        try:
            digest.update(Path(name).read_bytes())
        except OSError:
            return None
    return digest.hexdigest()[:16]


def compile_kernel(name: str, arch: int = 80) -> Kernels:
    """``tests/emulator/<name>.cpp`` as a library, on the code paths and limits of ``sm_<arch>``."""
    tree = Path(os.environ.get("LLMQAT_EMULATOR_TREE") or ROOT)
    flags = shlex.split(os.environ.get("LLMQAT_EMULATOR_FLAGS") or "") or FAST
    flags = [*flags, f"-DLLMQAT_EMULATED_ARCH={arch}"]
    cache = tree / CACHE.relative_to(ROOT)
    return Kernels(compile_library(tree / "tests/emulator" / f"{name}.cpp", flags, tree, cache))
