"""The GPU's figures for README: each bar of the Triton kernels with what was measured on it.

Ratios come from the newest rows of results/cuda.csv (the worst shape of a bar counts), the training
step from results/qat_slice_cuda.json. What needs no GPU says so: equality in Triton's interpreter,
and the bytes that autograd keeps. A figure without results is "not yet measured on a GPU".
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.entries.linears import OWN_W8A8
from benchmarks.qat_models import COMPOSED_GRADIENTS, FUSED
from benchmarks.qat_slice import GRAPH
from benchmarks.records import OURS, commits_of
from llmqat.errors import DataError

MISSING = "not yet measured on a GPU"
NOT_MEASURED = "not yet measured"
RUN = "make bench-gpu"
Row = Mapping[str, str]
Group = Sequence[Row]
"""An op's row, then its baselines'."""
Measured = tuple[str, bool]


@dataclass(frozen=True)
class Results:
    """What was measured: groups of rows of one GPU, and JSON results by file name."""

    groups: Sequence[Group]
    files: Mapping[str, Mapping[str, Any]]

    def find(self, op: str, variant: str = "", least: tuple[str, int] | None = None) -> list[Group]:
        """Groups of an op, of one variant (or all), whose size is at least so large."""
        return [
            group
            for group in self.groups
            if group[0]["op"] == op
            and variant in ("", group[0]["variant"])
            and (least is None or _size(group[0]["shape"], least[0]) >= least[1])
        ]


Reader = Callable[[Results], Measured | None]
"""What the table says and whether the bar is met; None where nothing was measured."""


@dataclass(frozen=True)
class GpuFigure:
    """One line of the table."""

    name: str
    bar: str
    read: Reader
    command: str = RUN
    missing: str = MISSING


def _size(shape: str, name: str) -> int:
    """``4096`` of ``LLaMA-7B M=4096 N=11008 K=4096``."""
    found = [part.split("=")[1] for part in shape.split() if part.startswith(f"{name}=")]
    return int(found[0]) if found else -1


def _failed(groups: Sequence[Group]) -> Measured | None:
    bad = [group[0] for group in groups if group[0]["gate"] != "passed"]
    return (f"gate failed at {bad[0]['shape']}", False) if bad else None


def _ratios(groups: Sequence[Group], baselines: Sequence[str]) -> list[tuple[float, str]]:
    """Ratios to some baselines, each with its shape."""
    return [
        (float(row["ratio"]), group[0]["shape"])
        for group in groups
        for row in group[1:]
        if row["candidate"] in baselines and row["ratio"]
    ]


def ratio(
    bar: float,
    op: str,
    variant: str,
    baselines: Sequence[str],
    least: tuple[str, int] | None = None,
    beside: tuple[str, str] | None = None,
) -> Reader:
    """The smallest ratio to any of the baselines over all shapes; ``beside``, (what it is called,
    candidate), is shown too and has no bar.
    """

    def read(results: Results) -> Measured | None:
        groups = results.find(op, variant, least)
        if failed := _failed(groups):
            return failed
        found = _ratios(groups, baselines)
        if not found:
            return None
        value, shape = min(found)
        best = max(found)[0]
        text = f"{value:.2f}x" if best == value else f"{value:.2f}x ({shape}) to {best:.2f}x"
        if beside and (others := _ratios(groups, (beside[1],))):
            text += f"; over {beside[0]} {min(others)[0]:.2f}x"
        return text, value >= bar

    return read


def bandwidth(bar: float, op: str) -> Reader:
    """The smallest share of the copy bandwidth."""

    def read(results: Results) -> Measured | None:
        groups = results.find(op, least=("rows", 2048))
        if failed := _failed(groups):
            return failed
        found = [(float(group[0]["percent_of_bound"]), group[0]["shape"]) for group in groups]
        if not found:
            return None
        value, shape = min(found)
        return f"{value:.0f} % ({shape}) to {max(found)[0]:.0f} %", value >= bar

    return read


def memory(bar: float, op: str, baseline: str) -> Reader:
    """The largest share of a baseline's memory on top of inputs and results."""

    def read(results: Results) -> Measured | None:
        found = []
        for group in results.find(op):
            for row in group[1:]:
                if row["candidate"] == baseline and row.get("peak_bytes"):
                    share = int(group[0]["peak_bytes"]) / max(1, int(row["peak_bytes"]))
                    found.append((share, group[0]["shape"]))
        if not found:
            return None
        share, shape = max(found)
        return f"{100 * share:.1f} % ({shape})", share <= bar

    return read


def _ours(figures: Mapping[str, Any]) -> str:
    """The fused form where it was measured."""
    return FUSED if FUSED in figures else "llmqat"


def step(what: str, met: Callable[[float], bool], beside: str = "") -> Reader:
    """A ratio of the training step of the slice, with activation checkpointing: of steps replayed
    as CUDA graphs, where they were, and beside it of steps that Python launches; ``beside`` is
    another ratio that is shown.
    """

    def read(results: Results) -> Measured | None:
        models = results.files.get("qat_slice_cuda", {}).get("models", {})
        shown, worst = [], True
        for name, model in models.items():
            ratios = model.get("checkpointing", {}).get("ratios")
            if ratios is None:
                continue
            ours = ratios[_ours(ratios)]
            launched = ours[what]
            shown_as = what + GRAPH if what + GRAPH in ours else what
            value = ours[shown_as]
            notes = [name]
            if shown_as != what:
                notes.append(f"launched from Python {launched:.2f}x")
            if beside in ours:
                notes.append(f"{beside} {ours.get(beside + GRAPH, ours[beside]):.2f}x")
            if shown_as in ratios.get(COMPOSED_GRADIENTS, {}):
                other = ratios[COMPOSED_GRADIENTS][shown_as]
                notes.append(f"gradients of dequantized codes by torch {other:.2f}x")
            shown.append(f"{value:.2f}x ({'; '.join(notes)})")
            worst = worst and met(value)
        return (", ".join(shown), worst) if shown else None

    return read


def saved_activations(results: Results) -> Measured | None:
    """Bytes kept by autograd over those of the plain step, at the width of LLaMA-7B."""
    models = results.files.get("saved_activations", {}).get("models", {})
    shares = {name: model["saved_over_plain"] for name, model in models.items()}
    found = {name: share[_ours(share)] for name, share in shares.items()}
    if not found:
        return None
    shown = ", ".join(f"{100 * value:.1f} % ({name})" for name, value in found.items())
    text = f"{shown}; counted, the same on every device; beside them 1 byte a weight for its codes"
    return text, max(found.values()) <= 0.60


def equality(file: str, cases_bar: bool) -> Reader:
    """Differences between the Triton backend and the specification."""

    def read(results: Results) -> Measured | None:
        found = results.files.get(file)
        if found is None:
            return None
        operators = len(found["by_operator"])
        clock = " of processor time" if found.get("clock") == "cpu" else ""
        text = (
            f"{found['differences']} in {found['cases']:,} cases of {operators} operators"
            f" ({found['shapes']:,} shapes, {found['cases_per_minute']:,.0f} a minute{clock})"
        )
        enough = found["shapes"] >= 5000 and found["cases_per_minute"] >= 1714
        return text, found["differences"] == 0 and (enough or not cases_bar)

    return read


def invariance(file: str) -> Reader:
    """Rows of a batch against the same rows alone, and a second run against the first."""

    def read(results: Results) -> Measured | None:
        found = results.files.get(file)
        if found is None:
            return None
        return (
            f"{found['differences']} differences; {found['batch_checks']:,} batches run twice, and"
            " a row of each alone",
            found["differences"] == 0,
        )

    return read


EAGER = ("eager", "eager, as published")
LEAN = ("the leanest eager", "eager, the paper's")
EAGER_LOSS = ("F.cross_entropy on probabilities", "F.kl_div")
COMPILED = ("torch.compile of the spec",)
INTERPRETER = "python -m benchmarks.equality --backend triton --save"
SAVED = "python -m benchmarks.qat_slice --saved-only --model slice --tokens 64 --save"
FIGURES = (
    GpuFigure(
        "Triton kernels against the specification, in the interpreter: differences",
        "0; >= 5,000 shapes, >= 1,714 cases a minute",
        equality("equality_triton", True),
        INTERPRETER,
        NOT_MEASURED,
    ),
    GpuFigure("The same on the device", "0", equality("equality_triton_cuda", False)),
    GpuFigure(
        "Linears and quantizers: same row, any batch, any run (interpreter)",
        "bitwise equal",
        invariance("equality_triton"),
        INTERPRETER,
        NOT_MEASURED,
    ),
    GpuFigure("The same on the device", "bitwise equal", invariance("equality_triton_cuda")),
    GpuFigure(
        "`fake_quantize` forward over eager",
        ">= 7x",
        ratio(7, "fake_quantize", "4 bit, forward", EAGER, beside=LEAN),
    ),
    GpuFigure(
        "`fake_quantize` forward and backward over eager",
        ">= 6x",
        ratio(6, "fake_quantize", "4 bit, forward and backward", EAGER, beside=LEAN),
    ),
    GpuFigure(
        "`fake_quantize` over torch.compile", ">= 1.2x", ratio(1.2, "fake_quantize", "", COMPILED)
    ),
    *(
        GpuFigure(f"`{op}` at 2048+ tokens, share of copy bandwidth", ">= 85 %", bandwidth(85, op))
        for op in ("rms_norm_quantize", "silu_mul_quantize")
    ),
    *(
        GpuFigure(
            f"W{bits}A8 at M = 4096 over cuBLAS bf16",
            ">= 1.5x",
            ratio(1.5, "repacked_matmul", f"W{bits}A8", ("F.linear bf16",), ("M", 4096)),
        )
        for bits in (8, 4)
    ),
    GpuFigure(
        "W4A8 over own W8A8 at M >= 1024",
        ">= 1.0x",
        ratio(1.0, "repacked_matmul", "W4A8", (OWN_W8A8,), ("M", 1024)),
    ),
    GpuFigure(
        "QAT step over the same distillation step without quantization (bf16, checkpointing)",
        "<= 0.95x",
        step("time over plain", lambda value: value <= 0.95),
    ),
    GpuFigure("Saved activations of that step", "<= 60 %", saved_activations, SAVED, NOT_MEASURED),
    GpuFigure(
        "QAT step: eager fake-quant over ours",
        ">= 2x",
        step("eager over ours", lambda value: value >= 2, beside="lean eager over ours"),
    ),
    GpuFigure(
        "`distillation_loss` forward and backward over eager",
        ">= 1.5x",
        ratio(1.5, "distillation_loss", "", EAGER_LOSS),
    ),
    GpuFigure(
        "`distillation_loss` memory over eager, beside inputs and gradients",
        "<= 10 %",
        memory(0.10, "distillation_loss", EAGER_LOSS[0]),
    ),
    GpuFigure(
        "`distillation_loss` over Liger fused KL including the teacher's head",
        ">= 1.15x",
        ratio(1.15, "distillation_loss", "", ("Liger with the teacher's head",)),
    ),
)
FILES = ("equality_triton", "equality_triton_cuda", "qat_slice_cuda", "saved_activations")


def groups_of(path: Path) -> tuple[list[Group], str]:
    """The newest group of each case of the GPU that was measured last, and its description."""
    if not path.exists():
        return [], ""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["op"] != "roofline"]
    if not rows:
        return [], ""
    last = rows[-1]
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["processor"] != last["processor"]:
            continue
        case = tuple(row[key] for key in ("op", "variant", "shape", "dtype"))
        if row["candidate"] == OURS:
            found[case] = []
        if case not in found:
            raise DataError(f"{path}: a baseline of {' '.join(case)} has no row before it")
        found[case].append(row)
    commits = commits_of(group[0]["commit"] for group in found.values())
    versions = ", ".join(
        f"{name} {last[key]}"
        for key, name in (("torch", "torch"), ("triton", "Triton"), ("driver", "driver"))
        if last.get(key)
    )
    return list(found.values()), f"{last['processor']}, {versions}, {commits}"


def table(results: Path, read_json: Callable[[Path], dict[str, Any] | None]) -> str:
    """The GPU's table and where it was measured."""
    groups, where = groups_of(results / "cuda.csv")
    found = {name: read_json(results / f"{name}.json") for name in FILES}
    measured = Results(groups, {name: value for name, value in found.items() if value is not None})
    lines = ["| Triton kernels | bar | measured | command |", "|---|---|---|---|"]
    for figure in FIGURES:
        try:
            answer = figure.read(measured)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{figure.name}: its results lack {error}; measure again") from error
        text = figure.missing if answer is None else answer[0]
        if answer is not None and not answer[1]:
            text += ": bar missed"
        lines.append(f"| {figure.name} | {figure.bar} | {text} | `{figure.command}` |")
    if not where:
        return "\n".join(lines) + f"\n\nGPU: {MISSING} (`{RUN}`)."
    return "\n".join(lines) + f"\n\nGPU: {where}."
