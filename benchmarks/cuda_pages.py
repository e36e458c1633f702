"""The sweeps of quantized generation as tables of docs/benchmarks.md, and what an A100 allows.

Limits of an A100 are computed from its data sheet and say so: none was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.attention import FORMS
from benchmarks.cuda_figures import (
    ATTENTION,
    BACKENDS,
    DECODE,
    DECODED,
    GEMM,
    Sweep,
    micro,
    read_results,
)
from benchmarks.gemm import LAYERS, Layer, layers_of
from benchmarks.gpu_figures import MISSING
from benchmarks.random_model import config_of, decode_bound, decode_bytes

A100 = (2039e9, 312e12, 624e12)
"""A100-80 SXM: bytes, bf16 and int8 operations a second by the data sheet."""
FORMATS = (("W16A16", (16, 16)), ("W8A8", (8, 8)), ("W4A16", (4, 16)), ("W4A8", (4, 8)))


def floor(layer: Layer, m: int, form: tuple[int, int], device: tuple[float, float, float]) -> float:
    """Seconds that the product takes at least by a data sheet."""
    copy, half, integer = device
    cost = layer.cost(m, *form)
    return max(cost.bytes / copy, cost.flops / half, cost.int_ops / integer)


def computed() -> str:
    """What an A100 allows, by its data sheet: not measured."""
    lines = [
        "### A100-80: computed, not measured\n",
        "The limits that its data sheet sets (2039 GB/s, 312 TFLOPS bf16, 624 TOPS int8). No A100"
        " was at hand; no figure of this package on one is claimed.\n",
        "| LLaMA-7B, four products of a layer, us | M=1 | 16 | 64 | 128 | 256 | 4096 |",
        "|---|---|---|---|---|---|---|",
    ]
    sheet, sizes = A100, (1, 16, 64, 128, 256, 4096)
    totals = {}
    for name, form in FORMATS:
        layers = layers_of("llama-7b")
        totals[name] = [sum(floor(layer, m, form, sheet) for layer in layers) for m in sizes]
        lines.append(f"| {name} | " + " | ".join(f"{1e6 * t:.0f}" for t in totals[name]) + " |")
    caps = (a / b for a, b in zip(totals["W16A16"], totals["W4A8"], strict=True))
    lines.append("| W4A8 over W16A16, at most | " + " | ".join(f"{c:.2f}x" for c in caps) + " |")
    lines += ["", "| Decode at context 2048, tok/s at most | B=1 | 16 | 64 |", "|---|---|---|---|"]
    for model in ("llama-7b", "llama-13b"):
        config = config_of(model)
        for label, w, kv in (("W16A16KV16", 16, 16), ("W4A8KV8", 4, 8), ("W4A8KV4", 4, 4)):
            rates = [
                decode_bound(sheet[0], b, decode_bytes(config, w, kv, b, 2048)) for b in (1, 16, 64)
            ]
            lines.append(f"| {model} {label} | " + " | ".join(f"{r:.0f}" for r in rates) + " |")
    return "\n".join(lines)


def layer_table(sweep: Sweep, model: str) -> str:
    """Time of a layer's four products by form and M."""
    sizes = sorted({int(c["M"]) for c, _ in sweep.cells() if c["model"] == model})
    names = list(dict.fromkeys(name for c, f in sweep.cells() if c["model"] == model for name in f))
    head = f"| {model}, us a layer | " + " | ".join(f"M={m}" for m in sizes) + " |"
    lines = [head, "|---" * (len(sizes) + 1) + "|"]
    for name in names:
        cells = []
        for m in sizes:
            parts = [sweep.cell(model=model, layer=layer, M=str(m)).get(name) for layer in LAYERS]
            times = [micro(part) for part in parts]
            cells.append(f"{sum(t or 0 for t in times):.1f}" if all(times) else "")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attention_table(sweep: Sweep) -> str:
    """Every cell: the best baseline, and each of our forms over it."""
    forms = [f"{backend} KV{b} {mode}" for backend in BACKENDS for b, mode in FORMS]
    lines = ["| heads, context x batch | best bf16, us | " + " | ".join(forms) + " |"]
    lines.append("|---" * (len(forms) + 2) + "|")
    for cell, rows in sweep.cells():
        times = {n: micro(r) for n, r in rows.items() if r["role"] == "baseline"}
        known = {name: t for name, t in times.items() if t}
        best = min(known, key=known.__getitem__, default=None)
        parts = []
        for form in forms:
            own = micro(rows.get(form))
            share = rows[form]["percent_of_copy"] if own else ""
            ratio = f"{known[best] / own:.2f}x " if own and best else ""
            parts.append(f"{ratio}({share} %)" if own else "")
        label = f"{cell['heads']} {cell['context']} x {cell['batch']}"
        shown = f"{best} {known[best]:.1f}" if best else ""
        lines.append(f"| {label} | {shown} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def sections(folder: Path, read_json: Callable[[Path], dict[str, Any] | None]) -> str:
    """docs/benchmarks.md: the sweeps as tables, and the computed limits."""
    results = read_results(folder, read_json)
    parts = []
    if results.gemm.rows:
        models = dict.fromkeys(cell["model"] for cell, _ in results.gemm.cells())
        tables = "\n\n".join(layer_table(results.gemm, model) for model in models)
        parts.append(f"### Products of a layer: {results.gemm.where}\n\n{tables}")
    else:
        parts.append(f"Products of a layer on a GPU: {MISSING} (`{GEMM}`).")
    if results.attention.rows:
        parts.append(
            f"### Decode attention: {results.attention.where}\n\nOver the best bf16 baseline, and"
            f" share of copy bandwidth.\n\n{attention_table(results.attention)}"
        )
    else:
        parts.append(f"Decode attention on a GPU: {MISSING} (`{ATTENTION}`).")
    if DECODED in results.files:
        parts.append(f"### Decode of a 7B model\n\n{decode_table(results.files[DECODED])}")
    else:
        parts.append(f"Decode of a 7B model on a GPU: {MISSING} (`{DECODE}`).")
    return "\n\n".join([*parts, computed()])


def decode_table(result: Mapping[str, Any]) -> str:
    """Tokens a second by batch size; the prefill beside them."""
    columns = {f"batch {batch}": found for batch, found in result["batches"].items()}
    if "prefill" in result:
        columns["prefill"] = result["prefill"]
    names = dict.fromkeys(
        n for f in columns.values() for n in (*f["tokens_per_second"], *f["notes"])
    )
    lines = ["| tok/s | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for found in columns.values():
            figure = found["tokens_per_second"].get(name)
            note = found["notes"].get(name, "")
            cells.append(f"{figure['p50']:.1f}" if figure else note)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    bounds = [f"{f['bound']['KV8']:.0f}" if "bound" in f else "" for f in columns.values()]
    return "\n".join([*lines, "| memory limit, W4A8KV8 | " + " | ".join(bounds) + " |"])
