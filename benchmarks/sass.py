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
from functools import cached_property, reduce
from importlib.util import find_spec
from operator import and_
from pathlib import Path

from benchmarks.cubin import SHARED_OF_DRIVER

_FUNCTION = re.compile(r"^\s*(?:Function\s?:?\s|\.entry\s+)(\w+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);"
)
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_BODY = "        /*"
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")
MMA = ("IMMA", "HMMA", "IGMMA", "HGMMA", "BMMA", "DMMA")
"""Instructions of the tensor cores."""
SCOREBOARDS = 6
_ENDS = frozenset({"EXIT", "RET", "BRX", "JMX", "KILL"})
"""Instructions after which nothing of the same kernel is known to run, unless predicated."""


class MissingTool(RuntimeError):
    """There is no `cuobjdump` on this machine."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``opcode`` with its modifiers, ``IMMA.16832.S8.S8``.

    ``scoreboard`` counts until its result is there; it begins when those of ``waits`` are at 0.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    scoreboard: int | None = None
    waits: frozenset[int] = frozenset()

    @cached_property
    def kind(self) -> str:
        """The opcode without modifiers, except for the width of memory accesses of 16 bytes."""
        name, *modifiers = self.opcode.split(".")
        return f"{name}.128" if "128" in modifiers else name

    @cached_property
    def target(self) -> int | None:
        """The address that a branch names."""
        found = _TARGET.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may not be taken: a predicate before it or among its operands."""
        return bool(self.predicate) or "," in self.operands or ".DIV" in self.opcode


@dataclass(frozen=True)
class Loop:
    """A natural loop: all its instructions, and those that every round executes once."""

    body: tuple[Instruction, ...]
    steady: tuple[Instruction, ...]
    innermost: bool


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


# ---- loops ----


def _successors(code: Sequence[Instruction], calls: bool = False) -> list[list[int]]:
    """For every instruction, the instructions that may run next; a call returns, unless ``calls``:
    then it also leads into the function.
    """
    at = {instruction.address: index for index, instruction in enumerate(code)}
    rejoins: dict[str, int] = {}
    found: list[list[int]] = []
    for index, i in enumerate(code):
        name = i.opcode.partition(".")[0]
        following = [index + 1] if index + 1 < len(code) else []
        if name == "BSSY" and i.target in at:
            rejoins[i.operands.partition(",")[0]] = at[i.target]
        if name in ("BRA", "JMP"):
            jump = [at[i.target]] if i.target in at else []
            found.append(jump + (following if i.conditional else []))
        elif name == "BSYNC" and i.operands.strip() in rejoins:
            found.append([rejoins[i.operands.strip()]] + (following if i.predicate else []))
        elif name == "CALL" and i.target in at:
            found.append([at[i.target], *following] if calls else following)
        elif name in _ENDS:
            found.append(following if i.predicate else [])
        else:
            found.append(following)
    return found


def _reachable(edges: Sequence[Sequence[int]], start: int) -> set[int]:
    found, pending = {start}, [start]
    while pending:
        new = [i for i in edges[pending.pop()] if i not in found]
        found.update(new)
        pending += new
    return found


def _jumps_as_branches(code: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """``code`` with calls that never return as BRA: ptxas leaves some loops by CALL.REL.NOINC."""
    edges = _successors(code, calls=True)
    at = {i.address: index for index, i in enumerate(code)}
    exits = {index for index, i in enumerate(code) if i.opcode == "EXIT"}

    def plain(i: Instruction) -> Instruction:
        jumps = i.kind == "CALL" and i.target in at
        if not jumps or not _reachable(edges, at[i.target or 0]) & exits:
            return i
        return replace(i, opcode="BRA")

    return tuple(plain(i) for i in code)


def _blocks(edges: Sequence[Sequence[int]]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instructions, and which blocks follow each."""
    starts = {0}
    for index, following in enumerate(edges):
        if list(following) != [index + 1]:
            starts |= {*following, index + 1}
    ordered = sorted(start for start in starts if start < len(edges))
    blocks = [range(a, b) for a, b in zip(ordered, [*ordered[1:], len(edges)], strict=True)]
    number = {block.start: k for k, block in enumerate(blocks)}
    return blocks, [[number[s] for s in edges[block[-1]]] for block in blocks]


def _preceding(following: Sequence[Sequence[int]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in following]
    for block, targets in enumerate(following):
        for target in targets:
            found[target].append(block)
    return found


def _dominators(
    following: Sequence[Sequence[int]], preceding: Sequence[Sequence[int]]
) -> list[int]:
    """For every block, those that every path from the first one passes, as bits; 0: unreachable."""
    found = [1] + [0] * (len(following) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(following)):
            known = [found[p] for p in preceding[block] if found[p]]
            if known:
                now = reduce(and_, known) | 1 << block
                changed, found[block] = changed or now != found[block], now
    return found


def natural_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops of a kernel, one for every header: back edges to a block that dominates them.

    Branches back from code that the compiler moved to the end are no loops, by this definition.
    """
    if not code:
        return []
    blocks, following = _blocks(_successors(code))
    preceding = _preceding(following)
    dominators = _dominators(following, preceding)
    bodies: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    for block, targets in enumerate(following):
        for header in targets:
            if not dominators[block] >> header & 1:
                continue
            latches.setdefault(header, []).append(block)
            body, pending = bodies.setdefault(header, {header}), [block]
            while pending:
                member = pending.pop()
                if member not in body:
                    body.add(member)
                    pending += [p for p in preceding[member] if dominators[p]]

    def instructions(members: set[int]) -> tuple[Instruction, ...]:
        return tuple(code[i] for block in sorted(members) for i in blocks[block])

    loops = []
    for header, body in sorted(bodies.items()):
        nested = set().union(*(b for b in bodies.values() if b < body))
        always = reduce(and_, (dominators[latch] for latch in latches[header]))
        steady = instructions({block for block in body - nested if always >> block & 1})
        loops.append(Loop(instructions(body), steady, innermost=not nested))
    return loops


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
    return _jumps_as_branches(code)


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
