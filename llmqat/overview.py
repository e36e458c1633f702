"""Which model families there are and what works for each: the tables of `llmqat info --families`
and docs/families.md, from the tables that the code itself uses.
"""

from __future__ import annotations

from typing import Any

from llmqat.eval.cost import ModelShape
from llmqat.models.families import ALWAYS, FAMILIES, Family
from llmqat.models.shapes import SHAPES
from llmqat.nn.fused import FUSABLE
from llmqat.ptq.channels import FOLDS, widest_folds
from llmqat.runtime.support import has_engine

WINDOWED = ("mistral", "qwen2", "qwen3")
"""Families whose configuration may have a sliding window."""


def _quantized(family: Family) -> str:
    short = ", ".join(name.rpartition(".")[2] for name in family.linears if "attn" in name)
    mlp = ", ".join(name.rpartition(".")[2] for name in family.linears if "mlp" in name)
    return f"{short}; {mlp}"


def _paper_kv(family: Family) -> str:
    if not family.kv_linears:
        return "k and v thirds of c_attn"
    return "outputs of k_proj, v_proj" + (", before k_norm" if family.head_norms else "")


def _biases(family: Family) -> str:
    names = [
        ("all" if set(linears) == set(family.linears) else "q, k, v")
        if switch == ALWAYS
        else f"by {switch}"
        for switch, linears in family.bias
    ]
    return ", ".join(names) or "none"


def _engine(family: Family) -> str:
    if not has_engine(family):
        return "transformers' forward instead"
    limits = []
    if family.name in WINDOWED:
        limits.append("up to its window")
    if family.head_norms:
        limits.append("quantized KV in serving mode")
    return "yes" + (f"; {', '.join(limits)}" if limits else "")


def _methods(family: Family) -> str:
    widest = widest_folds(family)
    if widest == list(FOLDS)[-1]:
        return "all"
    return f"all (smoothquant, awq: --folds {widest} at most)"


def families() -> list[dict[str, str]]:
    """One row per family: what it is, what is quantized, what works."""
    return [
        {
            "family": name,
            "model": family.architecture,
            "quantized linears": _quantized(family),
            "biases": _biases(family),
            "K and V in paper mode": _paper_kv(family),
            "train, export, eval": "yes",
            "--fused": "yes" if name in FUSABLE else "no",
            "engine (generate, generate-data)": _engine(family),
            "post-training methods": _methods(family),
        }
        for name, family in FAMILIES.items()
    ]


def shapes() -> list[dict[str, Any]]:
    """One row per released model: its sizes and where they stand."""
    rows = []
    for name, row in SHAPES.items():
        size = ModelShape.from_config(row.config())
        rows.append(
            {
                "name": name,
                "family": row.family,
                "layers": size.layers,
                "hidden": size.hidden,
                "MLP": size.intermediate,
                "heads/KV": f"{size.heads}/{size.kv_heads}",
                "head size": size.head_dim,
                "vocabulary": size.vocab,
                "tied head": "yes" if size.tied else "no",
                "quantized parameters": f"{size.linear_parameters() / 1e9:.3f} B",
                "numbers from": row.source,
            }
        )
    return rows


def to_dict() -> dict[str, Any]:
    """Both tables, for JSON."""
    return {"families": families(), "shapes": shapes()}


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def render() -> str:
    """Both tables in Markdown."""
    return f"{_markdown(families())}\n\n{_markdown(shapes())}"
