"""Compile every Triton kernel ahead of time, with no GPU, and check what came out.

    python -m benchmarks.kernel_report [--only TEXT ...] [--skip TEXT ...] [--arch 80 90]
                                       [--quick] [--json] [--save | --check]

Every form that a launch can select (``variants()`` of each file of kernels) is compiled for each
architecture; the table shows registers, memory and instructions, and the exit status is 1 if a gate
of `benchmarks.cubin` fails. --only takes variants whose "file/name" contains TEXT, --skip leaves
such out, --quick takes one variant of each kernel. --save writes docs/kernels/, --check says if
those pages are stale. Triton's cache lies in build/triton-cache, so that a repeat compiles only
what changed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.cubin import APPROXIMATE, ARCHS, cached_measure, compile_variant, failures
from llmqat.io import make_dir, remove, write_text
from llmqat_kernels.backends import triton as backend
from llmqat_kernels.backends.triton.launch import Variant

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "triton-cache"
PAGES = ROOT / "docs" / "kernels"
PROCESSES = 2
FLOAT_SUMS = frozenset({"attention_decode", "distillation_loss"})
"""Files whose results are sums of exponentials, exact up to the 2x rule of the specification."""
COLUMNS = ("registers", "resident", "shared", "spills", "instructions", "mma", "loads", "stores")


@dataclass(frozen=True)
class Result:
    """One variant on one architecture; without ``figures`` it did not compile."""

    module: str
    name: str
    arch: int
    promises: tuple[str, ...]
    figures: dict[str, int] | None = None
    failures: list[str] = field(default_factory=list)


def modules() -> list[str]:
    """The files of kernels that exist."""
    return [name for name in backend.MODULES if find_spec(f"{backend.__name__}.{name}")]


def kernels_of(module: str) -> ModuleType:
    """The imported file of kernels."""
    return importlib.import_module(f"{backend.__name__}.{module}")


@cache
def variants(module: str, arch: int) -> dict[str, Variant]:
    """The variants of a file by name.

    Raises:
        ValueError: two variants of one name.
    """
    found: dict[str, Variant] = {}
    for variant in kernels_of(module).variants(arch):
        if variant.name in found:
            raise ValueError(f"{module}: two variants are called {variant.name!r}")
        found[variant.name] = variant
    return found


def examine(module: str, name: str, arch: int) -> Result:
    """Compile one variant and check it against its gates."""
    promises: tuple[str, ...] = ()
    try:
        variant = variants(module, arch)[name]
        promises = tuple(
            sorted(variant.promises | ({APPROXIMATE} if module in FLOAT_SUMS else set()))
        )
        compiled = compile_variant(variant, arch)
    except Exception as error:  # whatever the compiler raises is a result of this report
        lines = [line for line in str(error).splitlines() if line.strip()]
        what = f"compile: {type(error).__name__}: {' | '.join(lines[-3:])}"
        return Result(module, name, arch, promises, failures=[what])
    figures = cached_measure(compiled, arch, CACHE / "figures")
    found = failures(figures, arch, promises)
    return Result(module, name, arch, promises, asdict(figures), found)


def _firsts(module: str, arch: int) -> list[str]:
    """The first variant of each kernel function."""
    first: dict[str, str] = {}
    for name, variant in variants(module, arch).items():
        first.setdefault(variant.kernel.__name__, name)
    return list(first.values())


def names(module: str, arch: int, quick: bool) -> list[str]:
    """The variants of a file; of one that cannot be imported a name that `examine` fails on."""
    try:
        return _firsts(module, arch) if quick else list(variants(module, arch))
    except Exception as error:  # one broken file must not hide the others
        return [f"variants(): {type(error).__name__}"]


def selected(
    only: Sequence[str], archs: Sequence[int], quick: bool = False, skip: Sequence[str] = ()
) -> list[tuple[str, str, int]]:
    """(file, variant, architecture) of everything that the options ask for."""
    return [
        (module, name, arch)
        for module in modules()
        for arch in archs
        for name in names(module, arch, quick)
        if not only or any(text in f"{module}/{name}" for text in only)
        if not any(text in f"{module}/{name}" for text in skip)
    ]


def run(jobs: Sequence[tuple[str, str, int]], processes: int = PROCESSES) -> list[Result]:
    """The results in the order of ``jobs``; kernels are compiled in ``processes`` at a time."""
    # Forked, so that the files of kernels are imported once.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(processes, len(jobs) or 1), mp_context=context) as pool:
        return list(pool.map(examine, *zip(*jobs, strict=True))) if jobs else []


def cells(figures: Mapping[str, int]) -> dict[str, str]:
    """What the tables show of a kernel."""
    of = {name: f"{figures[name]}" for name in ("registers", "spills", "instructions")}
    mma = [f"{figures[n]} {n.upper()}" for n in ("imma", "igmma", "hmma", "hgmma") if figures[n]]
    return of | {
        "resident": f"{figures['resident']}/64",
        "shared": f"{figures['shared']}",
        "mma": ", ".join(mma) or "-",
        "loads": f"{figures['wide_loads']}/{figures['loads']}",
        "stores": f"{figures['wide_stores']}/{figures['stores']}",
    }


def table(results: Sequence[Result]) -> Iterator[str]:
    """The results as text for a terminal, failures below their row."""
    width = max((len(f"{r.module}/{r.name}") for r in results), default=0)
    heads = {c: max(len(c), 9) for c in COLUMNS} | {"mma": 18}
    titles = " ".join(f"{c:>{w}}" for c, w in heads.items())
    yield f"{'kernel':{width}} arch {titles}"
    for r in results:
        shown = cells(r.figures) if r.figures else dict.fromkeys(COLUMNS, "?")
        row = " ".join(f"{shown[c]:>{w}}" for c, w in heads.items())
        yield f"{r.module + '/' + r.name:{width}} {r.arch:4} {row}"
        yield from (f"    FAILS {what}" for what in r.failures)


def _head(module: str, title: str, archs: Sequence[int]) -> list[str]:
    import triton

    doc = (kernels_of(module).__doc__ or "").strip().splitlines()
    kinds = ", ".join(f"sm_{arch}" for arch in archs)
    return [
        f"# {title}",
        "",
        f"{doc[0] if doc else ''} Source: `llmqat_kernels/backends/triton/{module}.py`.",
        "",
        f"Compiled ahead of time for {kinds} with triton {triton.__version__}, on a machine without"
        " a GPU, by `make kernels`",
        "(`python -m benchmarks.kernel_report --save`). Nothing here is a time.",
        "",
        "*resident*: warps an SM can hold at once, of 64. *shared*: bytes a thread block."
        " *loads*, *stores*: instructions",
        "of 16 bytes a thread / all to global memory. *mma*: tensor core instructions.",
        "",
    ]


def page(module: str, results: Sequence[Result], archs: Sequence[int]) -> str:
    """The page of one file of kernels: each variant with all architectures side by side."""
    by = {(r.name, r.arch): r for r in results}
    columns = [f"{c} {arch}" for c in COLUMNS for arch in archs]
    lines = _head(module, module, archs)
    lines.append(f"| kernel | {' | '.join(columns)} |")
    lines.append(f"|---|{'---:|' * len(columns)}")
    for name in dict.fromkeys(r.name for r in results):
        found = {arch: by.get((name, arch)) for arch in archs}
        shown = {arch: cells(r.figures) if r and r.figures else {} for arch, r in found.items()}
        row = [shown[arch].get(c, "") for c in COLUMNS for arch in archs]
        lines.append(f"| {name} | {' | '.join(row)} |")
    bad = [f"- {r.name} sm_{r.arch}: {what}" for r in results for what in r.failures]
    return "\n".join([*lines, *(["", "Gates that fail:", "", *bad] if bad else []), ""])


def pages(results: Sequence[Result], archs: Sequence[int]) -> dict[str, str]:
    """File name -> text of everything under docs/kernels."""
    import triton

    by_module: dict[str, list[Result]] = {}
    for result in results:
        by_module.setdefault(result.module, []).append(result)
    texts = {f"{m}.md": page(m, found, archs) for m, found in by_module.items()}
    data: dict[str, Any] = {"triton": triton.__version__, "kernels": [asdict(r) for r in results]}
    # One kernel a line: a change of one is a change of one line.
    rows = ",\n".join(json.dumps(row) for row in data["kernels"])
    texts["kernels.json"] = f'{{"triton": "{data["triton"]}", "kernels": [\n{rows}\n]}}\n'
    return texts


def save(texts: Mapping[str, str], folder: Path) -> None:
    """Write the pages and remove those of files that are gone."""
    make_dir(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    for path in folder.glob("*.md"):
        if path.name not in texts:
            remove(path)


def stale(texts: Mapping[str, str], folder: Path) -> list[str]:
    """Names of the pages that differ from ``texts``, are missing, or should not be there."""
    there = {path.name: path.read_text() for path in folder.glob("*") if path.is_file()}
    return sorted(n for n in {*texts, *there} if texts.get(n) != there.get(n))


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, check; 0 when every gate holds (and no page is stale with --check)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        description="Compile every Triton kernel with no GPU and check its gates.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="part of file/name")
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="the same, left out")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--save", action="store_true", help="write docs/kernels")
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/kernels is stale")
    options = parser.parse_args(argv)
    partly = options.only or options.skip or options.quick
    whole = not partly and set(options.arch) == set(ARCHS)
    if (options.save or options.check) and not whole:
        parser.error(
            "--save and --check take every kernel: leave --only, --skip, --arch and --quick out"
        )
    # Read when a kernel is defined: the kernels must be imported after this.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    jobs = selected(options.only, sorted(options.arch), options.quick, options.skip)
    if not jobs:
        parser.error(f"--only {' '.join(options.only)}: no variant has this in its name")
    results = run(jobs, options.processes)
    print(
        json.dumps([asdict(r) for r in results], indent=1)
        if options.json
        else "\n".join(table(results))
    )
    bad = [f"{r.module}/{r.name} sm_{r.arch}: {what}" for r in results for what in r.failures]
    for line in bad:
        print(f"FAILS {line}", file=sys.stderr)
    if not bad and not options.json:
        print(f"{len(results)} kernels, every gate holds")
    texts = pages(results, sorted(options.arch)) if options.save or options.check else {}
    if options.save:
        save(texts, PAGES)
    old = stale(texts, PAGES) if options.check else []
    for name in old:
        print(f"STALE docs/kernels/{name}: run `make kernels`", file=sys.stderr)
    return 1 if bad or old else 0


if __name__ == "__main__":
    sys.exit(main())
