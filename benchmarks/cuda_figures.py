"""The figures of quantized generation on a GPU for README (their tables: benchmarks/cuda_pages.py).

Read from results/gemm_cuda.csv and attention_cuda.csv (the newest row of each cell and candidate of
the GPU measured last), decode_7b_cuda.json, generate_data_cuda.json and equality_cuda_cuda.json. A
figure without results is "not yet measured on a GPU". What no GPU has to say is computed and says
so: the capacity of the cache (bytes as allocated).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attention import kv_capacity
from benchmarks.cells import parse_cell
from benchmarks.decode_7b import EAGER, INT4, OURS_CUDA
from benchmarks.decode_7b import OURS as ENGINE
from benchmarks.gemm import CUBLAS, LAYERS
from benchmarks.gpu_figures import MISSING, RUN
from benchmarks.records import commits_of
from llmqat.errors import DataError

FEW = (1, 2, 4, 8, 16)
LONG = 8192
BARS_TOK = {"H100": 600, "H200": 800}
BACKENDS = ("cuda", "triton")
DECODED = "decode_7b_cuda"
Row = Mapping[str, str]
Key = tuple[tuple[str, str], ...]
Measured = tuple[str, bool]


@dataclass(frozen=True)
class Sweep:
    """The newest rows of one part: cell -> candidate -> row; and where they come from."""

    rows: Mapping[Key, Mapping[str, Row]]
    where: str = ""

    def cell(self, **wanted: str) -> Mapping[str, Row]:
        """The candidates of the one cell with these values, or nothing."""
        for key, found in self.rows.items():
            if wanted.items() <= dict(key).items():
                return found
        return {}

    def cells(self) -> Iterable[tuple[dict[str, str], Mapping[str, Row]]]:
        """Every cell."""
        return ((dict(key), found) for key, found in self.rows.items())


def read_sweep(path: Path) -> Sweep:
    """The newest rows of the GPU that was measured last."""
    if not path.exists():
        return Sweep({})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return Sweep({})
    last = rows[-1]
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row["processor"] == last["processor"]:
            found.setdefault(tuple(parse_cell(row["cell"]).items()), {})[row["candidate"]] = row
    commits = commits_of(r["commit"] for cell in found.values() for r in cell.values())
    versions = ", ".join(f"{key} {last[key]}" for key in ("torch", "triton", "driver") if last[key])
    return Sweep(found, f"{last['processor']}, {versions}, {commits}")


@dataclass(frozen=True)
class Results:
    """Everything measured: the two sweeps, and JSON files by name."""

    gemm: Sweep
    attention: Sweep
    files: Mapping[str, Mapping[str, Any]]


def micro(row: Row | None) -> float | None:
    """The median time, if the row has one."""
    return float(row["p50_us"]) if row and row["p50_us"] else None


def failures(sweep: Sweep, name: str) -> Measured | None:
    """The first failed gate of a candidate of ours, if any."""
    for cell, found in sweep.cells():
        for candidate, row in found.items():
            if name in candidate and row["role"] == "ours" and row["gate"].startswith("failed"):
                label = " ".join(f"{k}={v}" for k, v in cell.items())
                return f"{candidate}, {label}: gate {row['gate']}", False
    return None


def best_backend(sweep: Sweep, form: str) -> str | None:
    """``cuda`` where the form was timed there, else ``triton``."""
    for backend in BACKENDS:
        name = f"{backend} {form}"
        if any(micro(found.get(name)) for _, found in sweep.cells()):
            return name
    return None


def layer_ratio(
    sweep: Sweep, ours: str, other: str, model: str, sizes: Sequence[int]
) -> list[tuple[float, int]]:
    """Time of the four products of a layer by ``other`` over ours, at every M that has all."""
    found = []
    for m in sizes:
        cells = [sweep.cell(model=model, layer=layer, M=str(m)) for layer in LAYERS]
        times = [(micro(c.get(other)), micro(c.get(ours))) for c in cells]
        if all(a and b for a, b in times):
            total = [sum(side or 0 for side in column) for column in zip(*times, strict=True)]
            found.append((total[0] / total[1], m))
    return found


Reader = Callable[[Results], Measured | None]


def products(other: str, form: str, bar: float, model: str = "llama-7b") -> Reader:
    """The smallest ratio of a layer's four products at M = 1..16."""

    def read(results: Results) -> Measured | None:
        if failed := failures(results.gemm, form):
            return failed
        name = best_backend(results.gemm, form)
        if name is None:
            return None
        found = layer_ratio(results.gemm, name, other, model, FEW)
        if not found:
            return None
        (low, at), high = min(found), max(found)[0]
        return f"{low:.2f}x (M={at}) to {high:.2f}x, {name}", low >= bar

    return read


def bandwidth(layers: Sequence[str], bar: float) -> Reader:
    """The smallest share of the copy bandwidth of W4A8 at M <= 16."""

    def read(results: Results) -> Measured | None:
        if failed := failures(results.gemm, "W4A8"):
            return failed
        name = best_backend(results.gemm, "W4A8")
        if name is None:
            return None
        found = []
        for m in FEW:
            for layer in layers:
                row = results.gemm.cell(model="llama-7b", layer=layer, M=str(m)).get(name)
                if micro(row) and row:
                    found.append((float(row["percent_of_copy"]), layer, m))
        if not found:
            return None
        low, layer, m = min(found)
        return f"{low:.0f} % ({layer}, M={m}) to {max(found)[0]:.0f} %, {name}", low >= bar

    return read


def attention(bits: int, bar: float, heads: str = "MHA") -> Reader:
    """The smallest ratio to the best baseline at contexts of 8k and more."""

    def read(results: Results) -> Measured | None:
        form = f"KV{bits} paper"
        if failed := failures(results.attention, form):
            return failed
        name = best_backend(results.attention, form)
        if name is None:
            return None
        found = []
        for cell, rows in results.attention.cells():
            others = [micro(r) for r in rows.values() if r["role"] == "baseline"]
            best, own = min((t for t in others if t), default=None), micro(rows.get(name))
            if best and own and cell["heads"] == heads and int(cell["context"]) >= LONG:
                found.append((best / own, f"{cell['context']} x {cell['batch']}"))
        if not found:
            return None
        low, at = min(found)
        return f"{low:.2f}x ({at}) to {max(found)[0]:.2f}x, {name}", low >= bar

    return read


def capacity(bits: int, bar: float) -> Reader:
    """Bytes as allocated; tests assert it."""

    def read(results: Results) -> Measured | None:
        value = kv_capacity(bits)
        return f"{value:.3f}x (bytes as allocated, on every device)", value >= bar

    return read


def _decode(results: Results) -> tuple[Mapping[str, Any], str] | None:
    found = results.files.get(DECODED)
    if found is None or "1" not in found["batches"]:
        return None
    return found["batches"]["1"], str(found.get("environment", {}).get("processor", ""))


def decode_rate(name: str, share_key: str) -> Reader:
    """Tokens a second of a candidate at batch 1, against the bar of the GPU."""

    def read(results: Results) -> Measured | None:
        found = _decode(results)
        if found is None or name not in found[0]["tokens_per_second"]:
            return None
        figure, processor = found
        rate = figure["tokens_per_second"][name]["p50"]
        bar = next((value for name, value in BARS_TOK.items() if name in processor), None)
        share = 100 * figure[share_key]
        text = f"{rate:.0f} tok/s on {processor}, {share:.0f} % of its memory limit"
        return text, bar is None or rate >= bar

    return read


def decode_ratio(other: str, bar: float) -> Reader:
    """Ours over another way to decode the same model at batch 1: with the kernels that `auto`
    takes, and with the CUDA C++ kernels first. The bar is met where one of them meets it.
    """

    def read(results: Results) -> Measured | None:
        found = _decode(results)
        if found is None:
            return None
        kinds = {"": "ratios", "CUDA C++ first ": "ratios_of_cuda"}
        measured = {
            what: found[0][key][other]
            for what, key in kinds.items()
            if other in found[0].get(key, {})
        }
        if not measured:
            return None
        text = ", ".join(f"{what}{value:.2f}x" for what, value in measured.items())
        return text, max(measured.values()) >= bar

    return read


def generation(results: Results) -> Measured | None:
    """The exact engine (KV16) over the batch-1 loop."""
    found = results.files.get("generate_data_cuda")
    if found is None:
        return None
    exact = {n: r for n, r in found["ratio_to_baseline"].items() if "approximate" not in n}
    if not exact:
        return None
    name = max(exact, key=exact.__getitem__)
    rate = found["tokens_per_second"][name]["p50"]
    where = f"{name.removeprefix('llmqat, ')}, {found['model']}, {found['max_len']} tokens"
    return f"{exact[name]:.1f}x ({where}, {rate:.0f} tok/s)", exact[name] >= 50


def equality(results: Results) -> Measured | None:
    """Differences of the CUDA kernels on the device."""
    found = results.files.get("equality_cuda_cuda")
    if found is None:
        return None
    text = (
        f"{found['differences']} in {found['cases']:,} cases, {found['batch_checks']:,} of them"
        " also one row of the batch alone and a second run"
    )
    return text, found["differences"] == 0


def invariance(results: Results) -> Measured | None:
    """Gates of the integer products: bits of rows in any batch, and of a second run."""
    if failed := failures(results.gemm, "A8"):
        return failed
    passed = [
        int(cell["M"])
        for cell, rows in results.gemm.cells()
        for name, row in rows.items()
        if row["role"] == "ours" and row["gate"] == "passed" and "A16" not in name
    ]
    if not passed:
        return None
    return (
        f"0 differences in {len(passed):,} products of M = {min(passed)} to {max(passed)}: first"
        " and last rows against the specification, and a second run",
        True,
    )


@dataclass(frozen=True)
class CudaFigure:
    """One line of the table."""

    name: str
    bar: str
    read: Reader
    command: str


def _command(part: str) -> str:
    return f"python -m benchmarks.{part} --device cuda --save"


GEMM, ATTENTION, DECODE = _command("gemm"), _command("attention"), _command("decode_7b")
FIGURES = (
    CudaFigure(
        "W4A8, four products of a 7B layer, M = 1..16, over cuBLAS bf16", ">= 3.2x",
        products(CUBLAS, "W4A8", 3.2), GEMM,
    ),
    CudaFigure(
        "The same, activations quantized too, over humming-kernels W4A8", ">= 1.3x",
        products("humming W4A8", "W4A8 + quantize", 1.3), GEMM,
    ),
    CudaFigure(
        "W4A8, M <= 16: share of copy bandwidth, qkv, gate_up, down", ">= 80 %",
        bandwidth(("qkv", "gate_up", "down"), 80), GEMM,
    ),
    CudaFigure("The same, o", ">= 60 %", bandwidth(("o",), 60), GEMM),
    CudaFigure(
        "Products: same row, any batch, any split, any run", "bitwise equal", invariance, GEMM
    ),
    *(
        CudaFigure(
            f"Decode attention, `paper` KV{bits}, MHA, context >= 8k, over the best bf16",
            f">= {bar}x", attention(bits, bar), ATTENTION,
        )
        for bits, bar in ((8, 2.0), (4, 3.5))
    ),
    *(
        CudaFigure(
            f"Capacity of a `paper` KV{bits} cache over bf16, scales included", f"{bar}x",
            capacity(bits, bar), "python -m pytest tests/benchmarks/test_attention.py",
        )
        for bits, bar in ((8, 1.998), (4, 3.99))
    ),
    CudaFigure(
        "7B-shaped W4A8KV8 decode, batch 1, context 2k", ">= 600 tok/s H100, >= 800 H200",
        decode_rate(ENGINE, "share_of_bound"), DECODE,
    ),
    CudaFigure("The same over compiled int4 decode", ">= 1.8x", decode_ratio(INT4, 1.8), DECODE),
    CudaFigure("The same over `transformers` bf16", ">= 10x", decode_ratio(EAGER, 10), DECODE),
    CudaFigure(
        "7B-shaped decode as above, CUDA C++ kernels before Triton's", "the same",
        decode_rate(OURS_CUDA, "share_of_bound_cuda"), DECODE,
    ),
    CudaFigure(
        "Data generation over batch-1 `transformers`", ">= 50x", generation,
        _command("generate_data"),
    ),
    CudaFigure(
        "CUDA kernels against the specification, on the device: differences", "0", equality,
        "python -m benchmarks.equality --backend cuda --device cuda --save",
    ),
)  # fmt: skip
FILES = (DECODED, "generate_data_cuda", "equality_cuda_cuda")


def read_results(results: Path, read_json: Callable[[Path], dict[str, Any] | None]) -> Results:
    """Everything in a folder of results."""
    found = {name: read_json(results / f"{name}.json") for name in FILES}
    return Results(
        read_sweep(results / "gemm_cuda.csv"),
        read_sweep(results / "attention_cuda.csv"),
        {name: value for name, value in found.items() if value is not None},
    )


def table(folder: Path, read_json: Callable[[Path], dict[str, Any] | None]) -> str:
    """README's table of quantized generation, and where it was measured."""
    results = read_results(folder, read_json)
    lines = ["| Quantized generation on a GPU | bar | measured | command |", "|---|---|---|---|"]
    for figure in FIGURES:
        try:
            answer = figure.read(results)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{figure.name}: its results lack {error}; measure again") from error
        text = MISSING if answer is None else answer[0]
        if answer is not None and not answer[1]:
            text += ": bar missed"
        lines.append(f"| {figure.name} | {figure.bar} | {text} | `{figure.command}` |")
    places = dict.fromkeys(w for w in (results.gemm.where, results.attention.where) if w)
    where = "; ".join(places) if places else f"{MISSING} (all of it: `{RUN}`)"
    return "\n".join(lines) + f"\n\nProducts and attention: {where}."
