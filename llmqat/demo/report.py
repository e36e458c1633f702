"""Results of the demonstration as `report.json`, `report.md` and plots."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from llmqat.demo.pipeline import Settings
from llmqat.errors import DataError
from llmqat.io import atomic_path, write_json, write_text

Results = dict[str, dict[str, Any]]
BYTES_PER_BF16 = 2
SMOOTHING = 16
LINEAR_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape")


def _tensors(folder: Path) -> dict[str, tuple[int, int]]:
    """Elements and bytes of every tensor in a checkpoint folder's safetensors files."""
    from safetensors import safe_open

    sizes: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                sizes[name] = (tensor.numel(), tensor.nbytes)
    if not sizes:
        raise DataError(f"{folder}: no safetensors file; run the stage that writes it again")
    return sizes


def checkpoint_bytes(teacher: Path, packed: Path) -> dict[str, Any]:
    """Bytes of the teacher as bf16 and of the packed checkpoint, whole and of the quantized
    linears alone.
    """
    full, small = _tensors(teacher), _tensors(packed)
    linear_names = {
        name.removesuffix("_packed") for name in small if name.endswith(".weight_packed")
    }
    linears = (
        sum(numel for name, (numel, _) in full.items() if name in linear_names) * BYTES_PER_BF16
    )
    packed_linears = sum(
        size for name, (_, size) in small.items() if name.endswith(LINEAR_SUFFIXES)
    )
    return {
        "full_precision": sum(numel for numel, _ in full.values()) * BYTES_PER_BF16,
        "packed": sum(size for _, size in small.values()),
        "linears": {
            "full_precision": linears,
            "packed": packed_linears,
            "ratio": packed_linears / linears,
        },
    }


def build_report(results: Results, settings: Settings, teacher: Path) -> dict[str, Any]:
    """The object of `report.json`."""

    def ppl(stage: str) -> float:
        return float(results[stage]["output"]["perplexity"])

    full_speed = results["generate_full_precision"]["output"]["tokens_per_second"]
    packed = results["generate"]["output"]
    best = max(full_speed.values())
    rtn, qat, full = ppl("eval_rtn"), ppl("eval_qat"), ppl("eval_full_precision")
    return {
        "setting": settings.bits,
        "kv_mode": settings.kv_mode,
        "perplexity": {
            "full_precision": full,
            "rtn": {settings.bits: rtn, settings.other_bits: ppl("eval_rtn_other")},
            "qat": {settings.bits: qat},
            "packed": ppl("eval_packed"),
        },
        "qat_over_rtn": qat / rtn,
        "gap_closed": (rtn - qat) / (rtn - full),
        "decode_tokens_per_second": {
            "full_precision": best,
            "packed": packed["tokens_per_second"],
            "full_precision_by_dtype": full_speed,
        },
        "decode_speedup": packed["tokens_per_second"] / best,
        "bytes": checkpoint_bytes(teacher, settings.output / "packed"),
        "seconds": {stage: round(result["seconds"], 1) for stage, result in results.items()},
        "text": {"prompt": packed["prompt"], "packed": packed["text"],
                 "full_precision": results["generate_full_precision"]["output"]["text"]},
        "commands": {stage: result["command"] for stage, result in results.items()},
    }  # fmt: skip


def headline(report: dict[str, Any]) -> str:
    """The one line of main figures."""
    p, s, b = report["perplexity"], report["decode_tokens_per_second"], report["bytes"]
    setting = report["setting"]
    return (
        f"SmolLM2-135M W-A-KV {setting}: perplexity {p['full_precision']:.1f} full precision, "
        f"{p['rtn'][setting]:.1f} RTN, {p['qat'][setting]:.1f} QAT, {p['packed']:.1f} packed; "
        f"decode {s['packed']:.0f} tok/s packed vs {s['full_precision']:.0f} full precision "
        f"({report['decode_speedup']:.1f}x); linears {b['linears']['ratio']:.2f}x of bf16"
    )


def render(report: dict[str, Any]) -> str:
    """`report.md`."""
    p, speed, size = report["perplexity"], report["decode_tokens_per_second"], report["bytes"]
    setting = report["setting"]
    rows = [("full precision", "16-16-16", p["full_precision"])]
    rows += [("round to nearest (RTN)", key, value) for key, value in p["rtn"].items()]
    rows += [("LLM-QAT", key, value) for key, value in p["qat"].items()]
    rows += [("LLM-QAT, packed", setting, p["packed"])]
    table = "\n".join(f"| {name} | {bits} | {value:.2f} |" for name, bits, value in rows)
    speeds = "\n".join(
        f"| transformers generate, {dtype} | {value:.1f} |"
        for dtype, value in speed["full_precision_by_dtype"].items()
    )
    seconds = "\n".join(f"| {stage} | {value:.0f} |" for stage, value in report["seconds"].items())
    commands = "\n".join(report["commands"].values())
    mib = 2**20
    return f"""# LLM-QAT demonstration: SmolLM2-135M at W-A-KV {setting} ({report["kv_mode"]} KV)

{headline(report)}.

The "full-precision" model is SmolLM2-135M-Instruct dequantized from 4-bit blocks: a real model, not its original
weights. The model wrote its own training text; no other data was used for training.

| model | W-A-KV | perplexity |
|---|---|---|
{table}

QAT over RTN: {report["qat_over_rtn"]:.2f}x; share of RTN's gap to full precision that QAT closes: {report["gap_closed"]:.0%}.

![perplexity](perplexity.png) ![training](training.png)

| decode, batch 1, one thread | tokens/s |
|---|---|
{speeds}
| packed W4A8, quantized KV cache | {speed["packed"]:.1f} |

| bytes (MiB) | bf16 | packed |
|---|---|---|
| quantized linears | {size["linears"]["full_precision"] / mib:.1f} | {size["linears"]["packed"] / mib:.1f} |
| whole checkpoint | {size["full_precision"] / mib:.1f} | {size["packed"] / mib:.1f} |

Text of the packed model after "{report["text"]["prompt"]}":

> {" ".join(report["text"]["packed"].split())}

| stage | seconds |
|---|---|
{seconds}

The commands:

```
{commands}
```
"""


def plot(report: dict[str, Any], folder: Path) -> None:
    """`perplexity.png` (bars) and `training.png` (loss over steps)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = report["perplexity"]
    bars = {"full precision": p["full_precision"]}
    bars |= {f"RTN {k}": v for k, v in p["rtn"].items()} | {
        f"QAT {k}": v for k, v in p["qat"].items()
    }
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    drawn = axes.bar(list(bars), list(bars.values()), color=["#555", "#c66", "#daa", "#48a"])
    axes.bar_label(drawn, fmt="%.1f")
    axes.set_ylabel("perplexity (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(folder / "perplexity.png") as path:
        figure.savefig(path, dpi=140, format="png")
    plt.close(figure)

    with (folder / "qat" / "training_curve.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    means = [fmean(losses[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="#bcd", label="one step (another text each time)")
    axes.plot(steps, means, color="#48a", label=f"mean of the last {SMOOTHING} steps")
    axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("distillation loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(folder / "training.png") as path:
        figure.savefig(path, dpi=140, format="png")
    plt.close(figure)


def write_report(results: Results, settings: Settings, teacher: Path) -> dict[str, Any]:
    """Write `report.json`, `report.md` and the plots into the demo folder; returns the report."""
    report = build_report(results, settings, teacher)
    plot(report, settings.output)
    write_json(settings.output / "report.json", report)
    write_text(settings.output / "report.md", render(report))
    return json.loads(json.dumps(report))  # type: ignore[no-any-return]
