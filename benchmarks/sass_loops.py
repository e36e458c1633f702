"""Control flow of machine code: which instructions a loop executes, and which in every round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import and_

_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_ENDS = frozenset({"EXIT", "RET", "BRX", "JMX", "KILL"})
"""Instructions after which nothing of the same kernel is known to run, unless predicated."""


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


def jumps_as_branches(code: Sequence[Instruction]) -> tuple[Instruction, ...]:
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
