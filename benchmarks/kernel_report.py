"""Compile every Triton kernel ahead of time, with no GPU, and check what came out.

    python -m benchmarks.kernel_report [--only TEXT ...] [--skip TEXT ...] [--arch 80 90] [--quick]
                                       [--fresh] [--verify N [--seed TEXT]] [--json]
                                       [--save | --check]

Every form that a launch can select (``variants()`` of each file of kernels) is compiled for each
architecture; the table shows registers, memory and instructions, and the exit status is 1 if a gate
of `benchmarks.gates` fails. A form whose content key (`benchmarks.kernel_keys`) docs/kernels
records is not compiled again: its recorded figures must pass the gates. --fresh compiles all of
them, --verify about N drawn by the seed (default: the commit), and says where the record is wrong.
--only takes forms whose "file/name" contains TEXT, --skip leaves such out, --quick takes one form
of each kernel. --save writes docs/kernels/, --check says if those pages are stale.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cubin import ARCHS, Figures, compile_variant, measure
from benchmarks.gates import failures
from benchmarks.kernel_forms import Form, drawn, promises, selected, variants
from benchmarks.kernel_keys import form_key
from benchmarks.kernel_pages import Result, pages, recorded, save, stale, table
from llmqat.io import make_dir, write_text

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "triton-cache"
FIGURES = CACHE / "figures"
PAGES = ROOT / "docs" / "kernels"
PROCESSES = 2
AT_ONCE = 16
"""Forms that one disassembler reads."""


def key_of(form: Form) -> str:
    """The content key of a form; empty if its file has no such variant."""
    module, name, arch = form
    try:
        return form_key(variants(module, arch)[name], arch)
    except Exception:  # compiling it says why
        return ""


def gated(form: Form, figures: Mapping[str, int]) -> Result:
    """The result of a form with known figures: the gates and promises are those of today."""
    module, name, arch = form
    said = promises(module, variants(module, arch)[name])
    found = failures(Figures(**figures), arch, said)
    return Result(module, name, arch, said, dict(figures), found, key_of(form))


def examine(forms: Sequence[Form], again: bool = False) -> list[Result]:
    """Compile forms and check them against their gates.

    Figures stay in the cache under the content key, so that a run that was interrupted goes on
    where it was; ``again``: they are not taken from there.
    """
    results: dict[Form, Result] = {}
    compiled: dict[Form, Any] = {}
    for form in forms:
        module, name, arch = form
        kept = FIGURES / f"{key_of(form)}.json"
        if kept.is_file() and not again:
            results[form] = gated(form, json.loads(kept.read_text()))
            continue
        try:
            compiled[form] = compile_variant(variants(module, arch)[name], arch)
        except Exception as error:  # whatever the compiler raises is a result of this report
            lines = [line for line in str(error).splitlines() if line.strip()]
            what = f"compile: {type(error).__name__}: {' | '.join(lines[-3:])}"
            results[form] = Result(module, name, arch, (), failures=[what], key=key_of(form))
    for arch in {form[2] for form in compiled}:
        mine = [form for form in compiled if form[2] == arch]
        for form, figures in zip(mine, measure([compiled[f] for f in mine], arch), strict=True):
            results[form] = gated(form, asdict(figures))
            write_text(make_dir(FIGURES) / f"{key_of(form)}.json", json.dumps(asdict(figures)))
    return [results[form] for form in forms]


def run(
    forms: Sequence[Form], processes: int = PROCESSES, again: bool = False
) -> dict[Form, Result]:
    """The results of ``forms``, compiled in ``processes`` at a time; ``again``: see `examine`."""
    # Forked, so that the files of kernels are imported once.
    context = multiprocessing.get_context("fork")
    parts = [forms[start : start + AT_ONCE] for start in range(0, len(forms), AT_ONCE)]
    with ProcessPoolExecutor(min(processes, len(parts) or 1), mp_context=context) as pool:
        return {
            result.form: result
            for part in pool.map(partial(examine, again=again), parts)
            for result in part
        }


def reusable(forms: Sequence[Form], records: Mapping[Form, Result]) -> dict[Form, Result]:
    """The results of forms whose recorded key is their key, with the gates of today."""
    found = {}
    for form in forms:
        known = records.get(form)
        if known and known.figures and known.key == key_of(form):
            found[form] = gated(form, known.figures)
    return found


def commit() -> str:
    """The commit that is checked out; a fixed text without one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return said.stdout.strip()


def disagreements(again: Mapping[Form, Result], known: Mapping[Form, Result]) -> Iterator[str]:
    """What forms that were compiled again show other than their record."""
    for form, result in again.items():
        now, said = result.figures or {}, known[form].figures or {}
        wrong = [f"{n} {now.get(n)} not {said.get(n)}" for n in said if now.get(n) != said[n]]
        if wrong:
            yield f"{form[0]}/{form[1]} sm_{form[2]}: {', '.join(wrong)}"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        description="Compile every Triton kernel with no GPU and check its gates.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="part of file/name")
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="the same, left out")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="one form of each kernel")
    parser.add_argument("--fresh", action="store_true", help="compile what is recorded, too")
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="so many of it")
    parser.add_argument("--seed", help="of --verify; default: the commit")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--save", action="store_true", help="write docs/kernels")
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/kernels is stale")
    options = parser.parse_args(argv)
    partly = options.only or options.skip or options.quick
    if (options.save or options.check) and (partly or set(options.arch) != set(ARCHS)):
        parser.error(
            "--save and --check take every kernel: leave --only, --skip, --arch and --quick out"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, check; 0 when every gate holds, no record is wrong and no page is stale."""
    options = parsed(argv)
    # Read when a kernel is defined: the kernels must be imported after this.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    archs = sorted(options.arch)
    forms = selected(options.only, archs, options.quick, options.skip)
    if not forms:
        print(f"--only {' '.join(options.only)}: no form has this in its name", file=sys.stderr)
        return 2
    known = {} if options.fresh else reusable(forms, recorded(PAGES)[1])
    seed = options.seed or commit()
    again = drawn(list(known), options.verify, seed) if options.verify else []
    missing = [form for form in forms if form not in known]
    compiled = run(missing, options.processes, options.fresh)
    wrong = list(disagreements(run(again, options.processes, again=True), known))
    found = known | compiled
    results = [found[form] for form in forms]
    print(
        json.dumps([asdict(r) for r in results], indent=1)
        if options.json
        else "\n".join(table(results))
    )
    bad = [f"{r.module}/{r.name} sm_{r.arch}: {what}" for r in results for what in r.failures]
    texts = pages(results, archs) if options.save or options.check else {}
    if options.save:
        save(texts, PAGES)
    old = stale(texts, PAGES) if options.check else []
    says = [f"FAILS {line}" for line in bad]
    says += [f"WRONG docs/kernels/kernels.json {line}: run `make kernels`" for line in wrong]
    says += [f"STALE docs/kernels/{name}: run `make kernels`" for name in old]
    print(*says, sep="\n", end="\n" if says else "", file=sys.stderr)
    drew = f", {len(again)} of them again to verify (seed {seed})" if again else ""
    print(
        f"{len(results)} forms: {len(compiled)} compiled, {len(known)} recorded with"
        f" the same key{drew}; {len(bad)} gates fail",
        file=sys.stderr,
    )
    return 1 if says else 0


if __name__ == "__main__":
    sys.exit(main())
