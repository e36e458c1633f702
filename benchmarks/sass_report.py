"""The machine code of every CUDA C++ kernel in the built library, with no GPU: report and gates.

    python -m benchmarks.sass_report [--library FILE] [--save | --check]

For sm_80 and sm_90: registers, static shared memory, stack, spills, and the instructions of each
round of the hot loop. The exit status is 1 if a gate of `benchmarks.sass_gates` fails. --save
writes docs/kernels/sass.md and sass.json; --check compares the library with them. Each source
of the record carries a hash of what decides
its code (the file, what it includes, the flags of nvcc; comments and layout do not count), so that
a test finds a stale record on a machine without nvcc.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import sass
from benchmarks.cubin import FAST_MATH
from benchmarks.sass_gates import ARCHS, EXPECTED, Expected, Figures, failures
from llmqat.io import write_text

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "kernels"
LIBRARY = ROOT / "llmqat_kernels" / "_native.abi3.so"
INCLUDE_FOLDERS = (ROOT / "csrc", ROOT / "csrc/include")
FLAGS = ("NVCC_FLAGS", "CUDA_ARCHS")
WIDE_LOADS = ("LDG.128", "LDGSTS.128")
GLOBAL = ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG")
"""Opcodes that read or write global memory."""
SHOWN = 9
"""Kinds of instructions that the page shows of a hot loop; the JSON has all."""


# ---- keys of sources ----


def without_comments(text: str) -> str:
    """C++ without comments, and with every run of white space as one blank; strings are kept."""
    pattern = r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/'
    kept = re.sub(pattern, lambda m: m[1] or " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", kept).strip()


def included(path: Path, folders: Sequence[Path] = INCLUDE_FOLDERS) -> Iterator[Path]:
    """``path`` and every file of the project that it includes, each once, in the order read."""
    pending, seen = [path], set[Path]()
    while pending:
        file = pending.pop()
        if file in seen:
            continue
        seen.add(file)
        yield file
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE)
        for name in names:
            found = [p.resolve() for f in (file.parent, *folders) if (p := f / name).is_file()]
            pending += found[:1]


def build_flags() -> str:
    """The flags and architectures of nvcc in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    return "\n".join(
        ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in FLAGS
    )


def source_key(path: Path, flags: str) -> str:
    """Hash of what decides the machine code of a .cu file, the compiler's release apart."""
    texts = sorted(without_comments(file.read_text()) for file in included(path))
    return hashlib.sha256("\0".join([flags, *texts]).encode()).hexdigest()[:16]


def source_keys() -> dict[str, str]:
    """The key of every .cu file, by name."""
    flags = build_flags()
    return {p.name: source_key(p, flags) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))}


def newer_sources(library: Path) -> list[str]:
    """CUDA sources that changed after the library was built."""
    built = library.stat().st_mtime_ns
    files = {f for cu in (ROOT / "csrc/cuda").glob("*.cu") for f in included(cu)}
    return sorted(str(f.relative_to(ROOT)) for f in files if f.stat().st_mtime_ns > built)


# ---- figures ----


def figures(kernel: sass.Kernel, ptx: str) -> Figures:
    """What the gates need of a kernel; ``ptx`` is its text, or empty where there is none."""
    opcodes = [i.opcode.split(".") for i in kernel.code]
    in_ptx = {name: len(re.findall(pattern, ptx)) for name, pattern in FAST_MATH.items()}
    around = kernel.around_hot_loop if sass.count(kernel.hot_loop, *sass.MMA) else ()
    under_way = sass.under_way(around)
    int4 = sum("MMA" in parts[0] and any(p in ("S4", "U4") for p in parts) for parts in opcodes)
    return Figures(
        source=kernel.source,
        name=kernel.name,
        arch=kernel.arch,
        registers=kernel.registers,
        stack=kernel.stack + kernel.local,
        spills=sass.count(kernel.code, "STL", "LDL", "STL.128", "LDL.128"),
        shared=kernel.shared,
        instructions=sum(i.kind != "NOP" for i in kernel.code),
        int4_mma=int4 + len(re.findall(r"\bmma\.\S*\.[su]4\.", ptx)),
        ftz=in_ptx["ftz"],  # not of SASS: its IEEE division tests operands with FSETP.FTZ
        tf32=sum("TF32" in parts for parts in opcodes) + in_ptx["tf32"],
        div_full=in_ptx["div_full"],
        approx=in_ptx["approx"],
        fma=in_ptx["fma"],
        wide_loads=sass.count(kernel.around_hot_loop, *WIDE_LOADS),
        waits=sum(i.opcode == "ACQBULK" for i in kernel.code),
        early=sum(i.opcode.split(".")[0] in GLOBAL for i in kernel.before("ACQBULK")),
        loads=len(under_way),
        covered=sum(4 * n >= sass.count(around, *sass.MMA) for n in under_way),
        loop=sass.mix(kernel.hot_loop),
    )


def of_library(library: Path) -> list[Figures]:
    """The figures of every kernel in a library, in a fixed order.

    The PTX is that of the newest architecture and is held against its figures only.

    Raises:
        sass.MissingTool: there is no cuobjdump.
    """
    texts = sass.ptx(library)
    found = [
        figures(kernel, texts.get(kernel.symbol, "") if kernel.arch == ARCHS[-1] else "")
        for kernel in sass.kernels(library)
    ]
    return sorted(found, key=lambda f: f.key)


# ---- pages ----


def record(kernels: Iterable[Figures], nvcc: str, keys: Mapping[str, str]) -> str:
    """sass.json: one kernel a line, figures that are 0 left out."""
    rows = ",\n".join(
        json.dumps({name: value for name, value in asdict(f).items() if value}) for f in kernels
    )
    head = json.dumps({"nvcc": nvcc, "sources": dict(keys)})[:-1]
    return f'{head}, "kernels": [\n{rows}\n]}}\n'


def recorded(folder: Path = PAGES) -> tuple[dict[str, Any], list[Figures]]:
    """(what it was built of, the figures) that ``folder`` records."""
    said = json.loads((folder / "sass.json").read_text())
    return said, [Figures(**row) for row in said.pop("kernels")]


def _row(f: Figures) -> str:
    kinds = sorted(f.loop.items(), key=lambda item: (not item[0].endswith("MMA"), -item[1]))
    loop = ", ".join(f"{n} {kind}" for kind, n in kinds[:SHOWN]) or "no loop"
    unpack = f"{f.unpack_per_mma:.2f}" if f.mma else "-"
    numbers = (f.registers, f.shared, f.stack, f.spills, f.instructions, f.wide_loads)
    length = f"{sum(f.loop.values())}"
    cells = [f"`{f.name}`", f"{f.arch}", *map(str, numbers), length, unpack, loop]
    return f"| {' | '.join(cells)} |"


def page(kernels: Sequence[Figures], nvcc: str) -> str:
    """sass.md."""
    promises = "\n".join(f"| `{_cell(pattern)}` | {_promise(p)} |" for pattern, p in EXPECTED)
    heads = "registers | shared | stack | spills | instructions | wide loads | loop | unpack"
    lines = [
        "# Machine code of the CUDA C++ kernels",
        "",
        f"Compiled by nvcc {nvcc}, read on a machine without a GPU by `make sass`"
        " (`python -m benchmarks.sass_report --save`). Nothing here is a time.",
        "",
        "*shared*: static bytes of a block. *loop*: instructions that each round of the hot loop",
        "executes: the one with the most MMAs, else the longest innermost one. *unpack*: its LOP3,",
        "PRMT, SHF and I2F for each MMA. *wide loads*: 16 bytes a thread from global memory",
        "(LDG.128, LDGSTS.128) in it and the loops around it. A load is *under way over MMAs* if a",
        "quarter of the MMAs of these loops follow before the first wait for its scoreboard.",
        "",
        "Everywhere: no stack, no spills, no call in the hot loop, no flushed subnormals, no TF32,",
        "no 4-bit MMA on sm_90, code for both architectures; on sm_90 no access of global memory",
        "before the kernel has waited for its turn. What each kernel promises besides:",
        "",
        "| kernels | promise |\n|---|---|\n" + promises,
    ]
    for source in dict.fromkeys(f.source for f in kernels):
        lines += ["", f"## {source}", "", f"| kernel | sm | {heads} | hot loop |"]
        lines += [f"|---|{'---:|' * 9}---|"]
        lines += [_row(f) for f in kernels if f.source == source]
    bad = [f"- {line}" for line in failures(kernels)]
    return "\n".join([*lines, *(["", "Gates that fail:", "", *bad] if bad else []), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _promise(p: Expected) -> str:
    said = [f"{p.mma} in the hot loop"] if p.mma else []
    said += ["loads of 16 bytes"] if p.wide else []
    said += [f"{p.covered:.0%} of the loads under way over MMAs"] if p.covered else []
    said += [f"unpack at most {n:g} on sm_{arch}" for arch, n in p.unpack.items()]
    said += ["float arithmetic by the 2x rule: FMA and ex2.approx allowed"] if p.float_math else []
    return "; ".join(said) or "-"


def nvcc_release() -> str:
    """The release of nvcc that compiled the installed library; empty if it has no CUDA code."""
    from llmqat_kernels import native

    return native.build_info().get("cuda") or ""


def differences(now: Iterable[Figures], said: Iterable[Figures]) -> list[str]:
    """What a library shows other than the record."""
    here, there = {f.key: asdict(f) for f in now}, {f.key: asdict(f) for f in said}
    found = []
    for key in sorted({*here, *there}):
        label = f"{key[0]} {key[1]} sm_{key[2]}"
        if key not in here or key not in there:
            found.append(f"{label}: not in the {'record' if key in here else 'library'}")
            continue
        wrong = [n for n, value in here[key].items() if value != there[key][n]]
        found += [f"{label}: {n} {here[key][n]}, recorded {there[key][n]}" for n in wrong]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print, check, write; 0 when every gate holds and nothing is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass_report",
        description="Registers, memory and instructions of the compiled CUDA C++ kernels.",
    )
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default: the installed one")
    parser.add_argument("--save", action="store_true", help="write docs/kernels/sass.*")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if docs/kernels/sass.* differs"
    )
    options = parser.parse_args(argv)
    if options.save and options.library != LIBRARY:
        parser.error("--save takes the installed library: leave --library out")
    nvcc = nvcc_release()
    if not options.library.is_file() or (options.library == LIBRARY and not nvcc):
        print(f"{options.library}: no library with CUDA code; build it with nvcc", file=sys.stderr)
        return 2
    kernels = of_library(options.library)
    says = [f"FAILS {line}" for line in failures(kernels)]
    if options.save or options.check:
        says += [f"STALE library: {name} is newer; build again" for name in newer_sources(LIBRARY)]
    if options.check:
        built, said = recorded()
        says += [f"STALE {line}: run `make sass`" for line in differences(kernels, said)]
        says += [] if built["sources"] == source_keys() else ["STALE sources: run `make sass`"]
    text = page(kernels, nvcc)
    if options.save and not any(line.startswith("STALE") for line in says):
        write_text(PAGES / "sass.md", text)
        write_text(PAGES / "sass.json", record(kernels, nvcc, source_keys()))
    if not options.save:
        print(text)
    print(*says, sep="\n", end="\n" if says else "", file=sys.stderr)
    print(f"{len(kernels)} kernel instances; {len(says)} complaints", file=sys.stderr)
    return 1 if says else 0


if __name__ == "__main__":
    sys.exit(main())
