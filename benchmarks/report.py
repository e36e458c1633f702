"""Write the tables of README.md and docs/benchmarks.md from what was measured.

    python -m benchmarks.report [--check]

README's tables come from benchmarks/results/*.json and, for the GPU, from *cuda.csv too
(benchmarks/gpu_figures.py, benchmarks/cuda_figures.py), between the markers `<!-- figures -->` and
`<!-- /figures -->`; the report of `make demo` is copied there first. The tables of
docs/benchmarks.md come from the newest rows of benchmarks/results/<device>.csv and from the sweeps
on a GPU (benchmarks/cuda_pages.py). A figure without a file says so, and a missed bar is marked.
Where anything was measured on a GPU, its tables of both pages also go to
benchmarks/results/report_cuda.md. `--check` writes nothing and exits with 1 if a page is stale.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cuda_figures, cuda_pages, gpu_figures
from benchmarks.records import OURS, Row, commits_of, table_head, table_line
from benchmarks.registry import cases
from benchmarks.timing import RESULTS, save
from llmqat.errors import DataError
from llmqat.io import write_text

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "runs" / "demo" / "report.json"
ROWS = ("<!-- rows -->", "<!-- /rows -->")
FIGURES = ("<!-- figures -->", "<!-- /figures -->")
MISSING = "not yet measured"
DEMO_SECONDS = 12 * 60
MACHINE = ("processor", "isa", "threads", "clock")
Measured = tuple[str, bool]
"""What the table says, and whether the bar is met."""


@dataclass(frozen=True)
class Figure:
    """One line of README's table; an ``optional`` one is left out until it is measured."""

    name: str
    bar: str
    file: str
    command: str
    read: Callable[[Mapping[str, Any]], Measured]
    optional: bool = False


def _equality(result: Mapping[str, Any]) -> Measured:
    counts = result["instruction_sets"]
    wrong = sum(count["differences"] for count in counts.values())
    elements = min(count["elements"] for count in counts.values())
    return f"{wrong} in {elements / 1e6:.0f} M elements on each of {', '.join(counts)}", wrong == 0


def _decode_transformers(result: Mapping[str, Any]) -> Measured:
    ratios, rates = result["ratios"], result["tokens_per_second"]
    fp32, bf16 = (ratios[f"transformers {dtype}"] for dtype in ("fp32", "bf16"))
    ours = rates[result["ratio_of"]]["p50"]
    return f"{fp32:.1f}x fp32, {bf16:.1f}x bf16 ({ours:.0f} tok/s)", min(fp32, bf16) >= 6


def _decode_llama_cpp(result: Mapping[str, Any]) -> Measured:
    names = [name for name in result["ratios"] if name.startswith("llama.cpp")]
    if not names:
        return MISSING, True
    ratio, rate = result["ratios"][names[0]], result["tokens_per_second"][names[0]]["p50"]
    return f"{ratio:.2f}x ({names[0]} {rate:.0f} tok/s)", ratio >= 1


def _qat_step(result: Mapping[str, Any]) -> Measured:
    ratio, fused = result["ratio"]["float"], result["ratio"]["fused"]
    note = f"{result['tokens']} tokens; {fused:.2f}x over our own fused fake-quantizer"
    return f"{ratio:.2f}x ({note})", ratio <= 0.85


def _generate_data(result: Mapping[str, Any]) -> Measured:
    ratios, rates = result["ratio_to_baseline"], result["tokens_per_second"]
    best = max(ratios, key=ratios.__getitem__)
    rate = f"{rates[best]['p50']:.0f} tok/s"
    return f"{ratios[best]:.1f}x ({best.removeprefix('llmqat, ')}, {rate})", ratios[best] >= 10


def _quality(result: Mapping[str, Any]) -> Measured:
    perplexity, setting = result["perplexity"], result["setting"]
    qat, rtn = perplexity["qat"][setting], perplexity["rtn"][setting]
    full = perplexity["full_precision"]
    text = f"{qat / rtn:.2f}x ({qat:.1f} over {rtn:.1f}; full precision {full:.1f})"
    return text, qat / rtn <= 0.65


def _bytes(result: Mapping[str, Any]) -> Measured:
    ratio = result["bytes"]["linears"]["ratio"]
    return f"{ratio:.3f}x", ratio <= 0.26


def _demo_time(result: Mapping[str, Any]) -> Measured:
    seconds = sum(result["seconds"].values())
    return f"{seconds / 60:.1f} min", seconds <= DEMO_SECONDS


DECODE = "python -m benchmarks.decode --save"
FIGURE_LIST = (
    Figure(
        "Codes, scales, packed bytes, accumulators: differences between the reference and each CPU"
        " instruction set",
        "0",
        "equality",
        "python -m benchmarks.equality --save",
        _equality,
    ),
    Figure(
        "Perplexity of SmolLM2-135M at 4-8-4: QAT over round-to-nearest",
        "<= 0.65x",
        "demo",
        "make demo",
        _quality,
    ),
    Figure(
        "Bytes of the quantized linears over bf16, on disk", "<= 0.26x", "demo", "make demo", _bytes
    ),
    Figure("`make demo`, two cores", "<= 12 min", "demo", "make demo", _demo_time),
    Figure(
        "Packed W4A8KV8 greedy decode on CPU, batch 1, one thread, over `transformers`",
        ">= 6x",
        "decode",
        DECODE,
        _decode_transformers,
    ),
    Figure("The same over llama.cpp at 4 bits", ">= 1x", "decode", DECODE, _decode_llama_cpp),
    *(
        Figure(
            f"QAT step on CPU, {what}: integer forward over the float fake-quantized one",
            "<= 0.85x",
            file,
            f"python -m benchmarks.qat_step{option} --save",
            _qat_step,
            optional=bool(option),
        )
        for what, file, option in (
            ("fp32", "qat_step_float32", ""),
            (
                "fp32, gradient checkpointing",
                "qat_step_float32_checkpointing",
                " --gradient-checkpointing",
            ),
            ("bf16", "qat_step_bfloat16", " --dtype bfloat16"),
        )
    ),
    Figure(
        "Data generation on CPU, tokens/s over batch-1 `transformers`",
        ">= 10x",
        "generate_data",
        "python -m benchmarks.generate_data --save",
        _generate_data,
    ),
)


def read_result(path: Path) -> dict[str, Any] | None:
    """The object of a results file, or None where there is none."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); measure again") from error
    if not isinstance(result, dict):
        raise DataError(f"{path}: not an object; measure again")
    return result


def figures(results: Path) -> str:
    """README's tables, and where they were measured."""
    lines = ["| figure | bar | measured | command |", "|---|---|---|---|"]
    machines: dict[str, list[str | None]] = {}
    for figure in FIGURE_LIST:
        path = results / f"{figure.file}.json"
        result = read_result(path)
        if result is None and figure.optional:
            continue
        text, met, command = MISSING, True, figure.command
        if result is not None:
            if result.get("clock") == "cpu":
                command += " --clock cpu"
            try:
                text, met = figure.read(result)
            except KeyError as error:
                raise DataError(f"{path}: has no {error}; measure again") from error
            if environment := result.get("environment"):
                machines.setdefault(_machine(environment), []).append(environment["commit"])
        measured = text if met else f"{text}: bar missed"
        lines.append(f"| {figure.name} | {figure.bar} | {measured} | `{command}` |")
    places = (f"{machine}, {commits_of(c)}" for machine, c in machines.items())
    where = f"\n\nMeasured on {'; '.join(places)}." if machines else ""
    return "\n\n".join(["\n".join(lines) + where, gpu_tables(results)])


def gpu_tables(results: Path) -> str:
    """README's tables of a GPU."""
    modules = (gpu_figures, cuda_figures)
    return "\n\n".join(module.table(results, read_result) for module in modules)


def _machine(environment: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{label}{environment[key]}"
        for key, label in (
            ("processor", ""),
            ("isa", ""),
            ("torch", "torch "),
            ("date", ""),
        )
        if environment.get(key)
    )


def copy_demo(report: Path) -> None:
    """Keep the demonstration's report beside the other results, if it is there and new."""
    result = read_result(report)
    if result is None:
        return
    kept = read_result(RESULTS / "demo.json") or {}
    if {key: value for key, value in kept.items() if key != "environment"} != result:
        save("demo", result)


def newest(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[Any, list[Any]]]:
    """Machine -> case -> the newest op row and the baselines measured with it."""
    found: dict[tuple[str, ...], dict[Any, list[Any]]] = {}
    for row in rows:
        if row["op"] == "roofline":
            continue
        section = found.setdefault(tuple(row[key] for key in MACHINE), {})
        case = tuple(row[key] for key in ("op", "variant", "shape", "dtype"))
        if row["candidate"] == OURS:
            section[case] = []
        section[case].append(row)
    return found


def row_tables(results: Path, device: str) -> list[str]:
    """One table for each machine that <device>.csv knows, in the registry's order."""
    path = results / f"{device}.csv"
    if not path.exists():
        return []
    order = [
        (case.entry.op, case.entry.variant, case.shape.label, case.dtype_name)
        for place in ("cpu", "cuda")
        for case in cases(device_type=place)
    ]
    with path.open(newline="") as file:
        sections = newest(csv.DictReader(file))
    found = {
        machine: [section[case] for case in order if case in section]
        for machine, section in sections.items()
    }
    return [_row_table(machine, groups) for machine, groups in found.items() if groups]


def _row_table(machine: tuple[str, ...], groups: Sequence[Sequence[Row]]) -> str:
    """The rows of one machine, and where they come from."""
    commits = commits_of(group[0]["commit"] for group in groups)
    dates = sorted({group[0]["time"][:10] for group in groups})
    label = dict(zip(MACHINE, machine, strict=True))
    title = f"{label['processor']} {label['isa']}".strip()
    first = groups[0][0]
    if first.get("cuda"):
        title += f", CUDA {first['cuda']}, driver {first['driver']}, triton {first['triton']}"
    else:
        title += f", {label['threads']} thread(s), {label['clock']} clock"
    head = (
        f"### {title}\n\nMeasured at {commits}, torch {first['torch']},"
        f" {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    return "\n".join([head, "", table_head(), *map(table_line, groups)])


def gpu_rows(results: Path) -> str:
    """The tables of a GPU in docs/benchmarks.md: operators, then sweeps."""
    parts = row_tables(results, "cuda")
    if not (results / "cuda.csv").exists():
        parts.append(f"GPU rows: {gpu_figures.MISSING} (`{gpu_figures.RUN}`).")
    return "\n\n".join([*parts, cuda_pages.sections(results, read_result)])


def kernel_tables(results: Path) -> str:
    """The tables of docs/benchmarks.md: the CPU's rows, then the GPU's."""
    parts = row_tables(results, "cpu")
    if not (parts or row_tables(results, "cuda")):
        parts.append(f"Rows: {MISSING} (`make bench`).")
    return "\n\n".join([*parts, gpu_rows(results)])


def gpu_report(results: Path) -> str | None:
    """Everything that was measured on a GPU as a page of its own; None where nothing was."""
    if not any(path.suffix in (".csv", ".json") for path in results.glob("*cuda*")):
        return None
    return "\n\n".join(
        [
            "# Measured on a GPU",
            f"By `{gpu_figures.RUN}`. What each table means: docs/benchmarks.md.",
            "## Figures",
            gpu_tables(results),
            "## Rows",
            gpu_rows(results) + "\n",
        ]
    )


def between(page: str, markers: tuple[str, str], content: str) -> str:
    """``page`` with ``content`` between the markers.

    Raises:
        DataError: the markers are not there once each, in order.
    """
    begin, end = markers
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise DataError(f"page: needs {begin} and then {end}, once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite both pages, or with `--check` only look; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    args = parser.parse_args(argv)
    if not args.check:
        copy_demo(DEMO)
    readme, docs = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    # The report of a GPU comes first: it needs no markers in a page.
    pages: list[tuple[Path, Callable[[], str | None]]] = [
        (RESULTS / "report_cuda.md", lambda: gpu_report(RESULTS)),
        (readme, lambda: between(readme.read_text(), FIGURES, figures(RESULTS))),
        (docs, lambda: between(docs.read_text(), ROWS, kernel_tables(RESULTS))),
    ]
    return int(any([not _current(path, make(), args.check) for path, make in pages]))


def _current(path: Path, text: str | None, check: bool) -> bool:
    """Whether a page is ``text`` (or there is none), which it becomes unless it is only checked."""
    if text is None or (path.exists() and path.read_text() == text):
        return True
    name = path.relative_to(ROOT)
    if check:
        print(f"{name} is stale: run `python -m benchmarks.report`", file=sys.stderr)
        return False
    write_text(path, text)
    print(f"{name} rewritten")
    return True


if __name__ == "__main__":
    sys.exit(main())
