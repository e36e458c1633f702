"""Machine code of a built library, read with no GPU: kernels, their resources, their loops.

Needs `cuobjdump`: the one that triton brings along, else the toolkit's.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from benchmarks.cubin import SHARED_OF_DRIVER
from benchmarks.sass_loops import Instruction, Loop, jumps_as_branches, natural_loops

_FUNCTION = re.compile(r"^\s*(?:Function\s?:?\s|\.entry\s+)(\w+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);"
)
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_BODY = "        /*"
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")
MMA = ("IMMA", "HMMA", "IGMMA", "HGMMA", "BMMA", "DMMA")
"""Instructions of the tensor cores."""
SCOREBOARDS = 6


class MissingTool(RuntimeError):
    """There is no `cuobjdump` on this machine."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; memory in bytes of a thread (stack, local) or a block."""

    symbol: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    code: tuple[Instruction, ...]

    @property
    def name(self) -> str:
        """The demangled name without namespaces and parameters: ``quantize_kernel<float, 4>``."""
        return short_name(demangle(self.symbol))

    @property
    def source(self) -> str:
        """The .cu file, or an empty string: only an anonymous namespace carries its name."""
        found = _SOURCE.search(self.symbol)
        return f"{found[1]}.cu" if found else ""

    def before(self, opcode: str) -> tuple[Instruction, ...]:
        """What lies before the first such instruction; nothing where there is none."""
        places = [place for place, i in enumerate(self.code) if i.opcode == opcode]
        return self.code[: places[0]] if places else ()

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, nested ones also on their own, in the order of their headers."""
        return natural_loops(self.code)

    @cached_property
    def hot_loop(self) -> tuple[Instruction, ...]:
        """What every round of the loop with the most MMAs executes, else of the longest innermost
        one; nothing without a loop. Inner loops and what is only sometimes executed (the epilogue
        of a persistent kernel, the slow path of a division) are left out.
        """
        steady = [loop.steady for loop in self.loops]
        mma = max(steady, key=lambda code: count(code, *MMA), default=())
        if count(mma, *MMA):
            return mma
        # MMAs that are all under a condition: then everything in that loop.
        mma = max((x.body for x in self.loops), key=lambda code: count(code, *MMA), default=())
        if count(mma, *MMA):
            return mma
        return max((x.steady for x in self.loops if x.innermost), key=len, default=())

    @cached_property
    def around_hot_loop(self) -> tuple[Instruction, ...]:
        """All of the outermost loop that the hot one is part of."""
        hot = set(self.hot_loop)
        return max((x.body for x in self.loops if hot <= set(x.body)), key=len, default=())


def count(code: Sequence[Instruction], *kinds: str) -> int:
    """Instructions of these kinds."""
    return sum(i.kind in kinds for i in code)


def under_way(loop: Sequence[Instruction]) -> list[int]:
    """For each global load of a loop, the MMAs between it and the first wait for its scoreboard,
    in the order of addresses, from the end on to the beginning.
    """
    found = []
    for index, load in enumerate(loop):
        if load.opcode.split(".")[0] != "LDG" or load.scoreboard is None:
            continue
        after = [*loop[index + 1 :], *loop[: index + 1]]
        end = next((k for k, i in enumerate(after) if load.scoreboard in i.waits), len(after))
        found.append(count(after[:end], *MMA))
    return found


def mix(code: Sequence[Instruction]) -> dict[str, int]:
    """Kinds of instructions, most frequent first."""
    counts = Counter(i.kind for i in code if i.kind != "NOP")
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# ---- names ----


def demangle(symbol: str) -> str:
    """The C++ name of a mangled symbol, by the C++ runtime that torch needs anyway."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or not address:
        return symbol
    text = ctypes.cast(address, ctypes.c_char_p).value or symbol.encode()
    release = ctypes.CDLL(None).free
    release.argtypes = [ctypes.c_void_p]
    release(address)
    return text.decode()


def short_name(demangled: str) -> str:
    """``void llmqat::(anonymous namespace)::f<llmqat::bf16, 8>(int)`` as ``f<bf16, 8>``."""
    text = demangled.replace("(anonymous namespace)", "anonymous")
    depth, end = 0, len(text)
    for index, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = index
            break
    text = re.sub(r"\b\w+::", "", text[:end])
    text = re.sub(r"\((?:bool|int|unsigned int|long)\)(?=[\d-])", "", text)
    return text.removeprefix("void ").strip()


# ---- reading a library ----


def tool(name: str) -> str:
    """The path of a binary utility.

    Raises:
        MissingTool: neither triton nor a toolkit has it.
    """
    spec = find_spec("triton")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / "backends/nvidia/bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise MissingTool(f"no {name}: install triton or the CUDA toolkit")
    return found


def _dump(option: str, path: Path) -> list[str]:
    command = [tool("cuobjdump"), option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _sections(lines: Sequence[str]) -> Iterator[tuple[int, str, list[str]]]:
    """(architecture, symbol, lines) of every function of a dump."""
    arch, symbol, body = 0, "", list[str]()
    for line in lines:
        if line.startswith(_BODY):  # nearly all of them
            body.append(line)
            continue
        new_arch, function = re.match(r"arch = sm_(\d+)", line), _FUNCTION.match(line)
        if (new_arch or function) and symbol:
            yield arch, symbol, body
            symbol = ""
        if new_arch:
            arch = int(new_arch[1])
        elif function:
            symbol, body = function[1], []
        elif symbol:
            body.append(line)
    if symbol:
        yield arch, symbol, body


def parse_code(lines: Sequence[str]) -> tuple[Instruction, ...]:
    """The instructions among the lines of a disassembly."""
    code = list[Instruction]()
    for line in lines:
        if m := _INSTRUCTION.match(line):
            code.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4].strip()))
        elif code and (m := _CONTROL.match(line)):
            code[-1] = _with_control(code[-1], int(m[1], 16))
    return jumps_as_branches(code)


def _with_control(i: Instruction, high: int) -> Instruction:
    """With the scoreboards in the upper half of its encoding (sm_70 and later)."""
    own = high >> 46 & 7
    waits = frozenset(n for n in range(SCOREBOARDS) if high >> 52 + n & 1)
    return replace(i, scoreboard=own if own < SCOREBOARDS else None, waits=waits)


def kernels(path: Path) -> list[Kernel]:
    """Every kernel in a library, object or cubin, on each architecture it holds code for.

    Raises:
        MissingTool: there is no cuobjdump.
    """
    resources: dict[tuple[int, str], tuple[int, int, int, int]] = {}
    for arch, symbol, body in _sections(_dump("-res-usage", path)):
        if found := _RESOURCES.search("\n".join(body)):
            registers, stack, shared, local = map(int, found.groups())
            shared = max(shared - SHARED_OF_DRIVER, 0) if arch >= 90 else shared
            resources[arch, symbol] = registers, stack, local, shared
    return [
        Kernel(symbol, arch, *resources[arch, symbol], parse_code(body))
        for arch, symbol, body in _sections(_dump("-sass", path))
    ]


def ptx(path: Path) -> Mapping[str, str]:
    """Symbol -> text of every kernel that the library holds as PTX."""
    return {symbol: "\n".join(body) for _, symbol, body in _sections(_dump("-ptx", path))}
