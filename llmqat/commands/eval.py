"""`llmqat eval`: perplexity and question sets of a full-precision or quantized model."""

from __future__ import annotations

import json
import math
from typing import Any

from llmqat.config import QATConfig
from llmqat.eval.arguments import EvalArguments
from llmqat.eval.run import QUANTIZERS, evaluate
from llmqat.eval.tasks.catalog import TASKS
from llmqat.train.arguments import QuantArguments

__all__ = ["ARGUMENTS", "EvalArguments", "evaluate", "run"]

ARGUMENTS = (EvalArguments, QuantArguments)
_COLUMNS = ("task", "reported", "score", "+-", "acc", "acc_norm", "questions", "shots")


def run(arguments: EvalArguments, quantization: QuantArguments) -> None:
    """Print the result: lines and a table for people, or one JSON object."""
    result = evaluate(arguments, quantization.to_config())
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
        return
    for text in result.get("texts", [result] if "text" in result else []):
        print(_text_line(result, text))
    if "tasks" in result:
        print(f"setting {result['setting']} ({_stage(result)})")
        print("\n".join(_table(result["tasks"])))
        if result["average_of"]:
            print(
                f"average of {result['average_of']} zero-shot tasks: {result['average']:.4f} as"
                f" reported, {result['average_acc']:.4f} plain accuracy"
            )


def _stage(result: dict[str, Any]) -> str:
    rank = result.get("rank")
    groups = (
        ""
        if result["group_size"] in (None, -1)
        else f", groups of {result['group_size']}, {result['weight_scale_dtype']} scales"
    )
    unusual = "".join(
        f", {name.replace('_', '-')} {result[name]}"
        for name in QUANTIZERS
        if result[name] not in (None, getattr(QATConfig, name))
    )
    return str(result["stage"]) + ("" if rank is None else f" with rank {rank}") + groups + unusual


def _text_line(result: dict[str, Any], text: dict[str, Any]) -> str:
    word = text["protocol"] == "word"
    return (
        f"{'word ' if word else ''}perplexity {math.exp(min(text['nll'], 700)):.4f}  setting"
        f" {result['setting']}  ({_stage(result)}, {text['tokens']} tokens"
        + (f", {text['words']} words, {text['documents']} documents" if word else "")
        + f" in windows of {text['seq_len']}, {text['seconds']:.1f} s)"
    )


def _table(tasks: dict[str, dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, entry in tasks.items():
        metric = TASKS[name].metric
        shown = [entry.get(key) for key in (metric, f"{metric}_stderr", "acc", "acc_norm")]
        numbers = ["-" if value is None else f"{value:.4f}" for value in shown]
        rows.append((name, metric, *numbers, str(entry["questions"]), str(entry["shots"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
