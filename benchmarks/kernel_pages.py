"""What docs/kernels says of the compiled forms of the Triton kernels: pages and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cubin import Figures
from benchmarks.kernel_forms import Form, kernels_of
from llmqat.io import make_dir, remove, write_text

COLUMNS = ("registers", "resident", "shared", "spills", "instructions", "mma", "loads", "stores")
RECORDS = "kernels.json"
MARK = "by `make kernels`"
"""In every page that is written here; the folder has pages of other kernels, too."""


@dataclass(frozen=True)
class Result:
    """One form; without ``figures`` it did not compile. ``key``: see benchmarks/kernel_keys.py."""

    module: str
    name: str
    arch: int
    promises: tuple[str, ...]
    figures: dict[str, int] | None = None
    failures: list[str] = field(default_factory=list)
    key: str = ""

    @property
    def form(self) -> Form:
        return self.module, self.name, self.arch


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
        f" a GPU, {MARK}",
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
    # One form a line: a change of one is a change of one line.
    rows = ",\n".join(json.dumps(_record(result)) for result in results)
    texts[RECORDS] = f'{{"triton": "{triton.__version__}", "kernels": [\n{rows}\n]}}\n'
    return texts


def _record(result: Result) -> dict[str, Any]:
    """A result as it is recorded: figures that are 0 are left out."""
    said = {name: n for name, n in result.figures.items() if n} if result.figures else None
    record = {
        "module": result.module, "name": result.name, "arch": result.arch, "key": result.key,
        "promises": result.promises, "figures": said,
    }  # fmt: skip
    return record | ({"failures": result.failures} if result.failures else {})


def recorded(folder: Path) -> tuple[str, dict[Form, Result]]:
    """The release of triton that ``folder`` records and its results; none if there is no record."""
    path = folder / RECORDS
    if not path.is_file():
        return "", {}
    said = json.loads(path.read_text())
    zeros = dict.fromkeys(Figures.__dataclass_fields__, 0)
    results = []
    for row in said["kernels"]:
        figures = None if row["figures"] is None else zeros | row["figures"]
        results.append(
            Result(
                row["module"], row["name"], row["arch"], tuple(row["promises"]), figures,
                row.get("failures", []), row["key"],
            )
        )  # fmt: skip
    return said["triton"], {result.form: result for result in results}


def save(texts: Mapping[str, str], folder: Path) -> None:
    """Write the pages and remove those of files that are gone."""
    make_dir(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    for name in _written_here(folder).keys() - texts.keys():
        remove(folder / name)


def _written_here(folder: Path) -> dict[str, str]:
    """The record and the pages that earlier runs wrote."""
    texts = {path.name: path.read_text() for path in folder.glob("*.md")}
    texts = {name: text for name, text in texts.items() if MARK in text}
    record = folder / RECORDS
    return texts | ({RECORDS: record.read_text()} if record.is_file() else {})


def stale(texts: Mapping[str, str], folder: Path) -> list[str]:
    """Names of the pages that differ from ``texts``, are missing, or should not be there."""
    there = _written_here(folder)
    return sorted(n for n in {*texts, *there} if texts.get(n) != there.get(n))
