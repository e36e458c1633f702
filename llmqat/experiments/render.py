"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmqat.experiments.report import NOT_RUN
from llmqat.experiments.results import FAILED, short
from llmqat.experiments.runner import duration
from llmqat.experiments.tables import PERPLEXITY, ZERO_SHOT

Record = Mapping[str, Any]


def name_of(column: str) -> str:
    """``perplexity/wikitext2`` as ``ppl wikitext2``."""
    if column.startswith(PERPLEXITY):
        return f"ppl {column.removeprefix(PERPLEXITY)}"
    return column


def number(value: float | None, column: str) -> str:
    """A value with the digits that mean something."""
    if value is None:
        return "-"
    if column.startswith(PERPLEXITY):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.1f}"


def published(value: float | None) -> str:
    """A value of the paper, which prints one digit after the point."""
    return "-" if value is None else f"{value:.1f}"


def shown(row: Record, column: str) -> str:
    """Our value of a cell: mean, and spread over seeds; or why there is none."""
    entry = row["values"].get(column)
    if entry is None:
        if row["status"] == FAILED:
            return f"failed: {row['error']}".replace("|", "/")
        return NOT_RUN
    if entry["mean"] is None:
        return "inf"
    text = number(entry["mean"], column)
    if entry["spread"] is not None:
        text += f" ± {number(entry['spread'], column)} ({entry['seeds']})"
    return text


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _setting(row: Record) -> str:
    return f"{row['bits']} {row['kv_mode']}" if row["kv_mode"] else str(row["bits"])


def _label(row: Record) -> str:
    """A row's method, and what sets its cells apart."""
    notes = [row["note"]] if row["note"] else []
    if row["processes"] and row["processes"][-1] > 1:
        notes.append(f"{' and '.join(map(str, row['processes']))} processes")
    notes += [f"{role} {short(digest)}" for role, digest in row["other_inputs"].items()]
    return row["label"] + (f" ({'; '.join(notes)})" if notes else "")


def _inputs(table: Record) -> list[str]:
    """What the cells of a table read beside the model; nothing where no record says."""
    if not table["inputs"]:
        return []
    several = {role: by for role, by in table["inputs_by_cells"].items() if len(by) > 1}
    text = ", ".join(f"{role} {short(digest)}" for role, digest in table["inputs"].items())
    unknown = table["cells_without_inputs"]
    text += f"; {unknown} older cells do not say" if unknown else ""
    parts = [f"Read beside the model (SHA-256): {text}."]
    if several:
        listed = "; ".join(
            f"{role} " + ", ".join(f"{short(digest)} in {n}" for digest, n in by.items())
            for role, by in several.items()
        )
        parts.append(
            f"**Cells of this table read different inputs** ({listed} cells). Rows with another"
            " input name it; comparisons and pictures leave them out."
        )
    return parts


def _table(table: Record) -> list[str]:
    ours = [column for column in table["columns"] if column not in ZERO_SHOT]
    theirs = [column for column in table["paper_columns"] if column not in ZERO_SHOT]
    # A column that both have stands side by side; the paper's others follow.
    theirs = [c for c in ours if c in theirs] + [c for c in theirs if c not in ours]
    header = ["method", "W-A-KV"]
    header += [f"{name_of(column)}" for column in ours]
    header += [f"paper {model} {name_of(c)}" for model in table["paper_models"] for c in theirs]
    has_cost = any(row["cost"] for row in table["rows"])
    header += ["GiB", "OPs"] if has_cost else []
    header += ["time"]
    rows = []
    for row in table["rows"]:
        cells = [_label(row), _setting(row)]
        cells += [shown(row, column) for column in ours]
        cells += [
            published(row["published"][model][c]) for model in table["paper_models"] for c in theirs
        ]
        if has_cost:
            cells += [f"{row['cost']['total_gib']:.3f}", f"{row['cost']['ops']:.2e}"]
        cells += [duration(row["seconds"]) if row["stages"] else "-"]
        rows.append(cells)
    return [grid(header, rows)]


def _tasks(table: Record) -> list[str]:
    """The eight tasks of rows that have them, ours over the paper's."""
    columns = [column for column in table["columns"] if column in ZERO_SHOT]
    if not columns:
        return []
    rows = []
    for row in table["rows"]:
        if any(row["values"].get(column) for column in columns):
            rows.append([_label(row), _setting(row), "ours", *(shown(row, c) for c in columns)])
        for model in table["paper_models"]:
            values = row["published"][model]
            if any(values.get(column) is not None for column in columns):
                numbers = [published(values.get(column)) for column in columns]
                rows.append([row["label"], _setting(row), model, *numbers])
    body = grid(["method", "W-A-KV", "whose", *columns], rows)
    return [f"<details><summary>task by task</summary>\n\n{body}\n\n</details>"]


def _comparison(table: Record) -> list[str]:
    parts = []
    if table["settings"]:
        column = table["primary"]
        rows = [
            [
                _setting(entry),
                number(entry["qat"], column) if entry["qat"] is not None else "inf",
                number(entry["best_ptq"], column) if entry["best_ptq"] is not None else "inf",
                entry["best_ptq_method"],
                "yes" if entry["better"] else "no",
                "-" if entry["gap_closed"] is None else f"{entry['gap_closed']:.0%}",
            ]
            for entry in table["settings"]
        ]
        won = sum(entry["better"] for entry in table["settings"])
        header = ["W-A-KV", "LLM-QAT", "best post-training", "method", "LLM-QAT better",
                  "share of RTN's gap closed"]  # fmt: skip
        parts.append(
            f"By {name_of(column)}, LLM-QAT is better than the best post-training method in {won}"
            f" of {len(rows)} settings.\n\n{grid(header, rows)}"
        )
    for entry in table["order"]:
        parts.append(
            f"Pairs of rows ordered as for the paper's {entry['model']} ({name_of(entry['ours'])}"
            f" here, {name_of(entry['paper'])} there): {entry['same']} of {entry['pairs']}."
        )
    return parts


def _costs(table: Record) -> list[str]:
    if "costs" not in table:
        return []
    costs = table["costs"]
    rows = []
    for line in costs["lines"]:
        published, cheaper = line["published_days"], line["cheaper_from"]
        rows.append(
            [
                line["label"],
                line["setting"],
                line["speed"],
                f"{line['fixed_days']:.1f}",
                f"{line['inference_days']:.0f}",
                f"{line['total_days']:.0f}",
                "-" if published is None else f"{published:.0f}",
                "-" if cheaper is None else f"{cheaper:,.0f}",
            ]
        )
    header = ["method", "W-A-KV", "speed", "fixed", "inferences", "total", "paper, inferences",
              "cheaper than full precision from"]  # fmt: skip
    return [f"A100 days for {costs['inferences']:,.0f} inferences:\n\n{grid(header, rows)}"]


def _section(table: Record, pictures: Sequence[str]) -> str:
    done = sum(row["status"] not in (NOT_RUN, FAILED) for row in table["rows"])
    parts = [f"## {table['name']}: {table['title']}", f"{table['source']}. {done} of"
             f" {len(table['rows'])} rows done."]  # fmt: skip
    if table["overrides"]:
        parts.append(f"Changes of the budget here: {', '.join(table['overrides'])}.")
    parts += _inputs(table)
    parts += _table(table)
    parts += [f"![{table['name']}]({picture})" for picture in pictures]
    parts += _comparison(table)
    parts += _costs(table)
    parts += _tasks(table)
    notes = list(table["notes"])
    reasons = dict.fromkeys(
        row["lost"]
        for row in table["rows"]
        if row["lost"] and any(v is None for by in row["published"].values() for v in by.values())
    )
    notes += [f'"-" in a column of the paper: {reason}.' for reason in reasons]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part)


def render(report: Record, pictures: Mapping[str, Sequence[str]]) -> str:
    """``report.md``.

    Args:
        pictures: file names by table.
    """
    cells, versions = report["cells"], report["versions"]
    lines = [
        f"# The paper's tables on {report['title']}, budget {report['budget']}",
        f"Model {report['model']}, SHA-256 {', '.join(map(short, report['model_sha256']))};"
        f" {cells['done']} cells done, {cells['failed']} failed; {duration(report['seconds'])} of"
        f" work in {len(report['stages'])} stages; seeds {', '.join(map(str, report['seeds']))}."
        f" Every command with its time is in `commands.txt`, every number in `report.json`.",
        "The paper's numbers are of LLaMA models of 7 billion parameters and more, by its own"
        " protocol: orders compare, absolute values do not. ± is the standard deviation over seeds"
        " (their number). GiB are weights and the KV cache of 2,048 tokens, OPs are MACs x weight"
        " bits x activation bits of 2,048 tokens.",
    ]
    if report["stand_ins"]:
        lines.append("Stand-ins, not the paper's data:")
        lines.append("\n".join(f"- {name}: {text}." for name, text in report["stand_ins"].items()))
    lines.append(grid(list(versions), [list(versions.values())]) if versions else "")
    lines += [_section(table, pictures.get(table["name"], ())) for table in report["tables"]]
    return "\n\n".join(line for line in lines if line) + "\n"


def commands(report: Record) -> str:
    """``commands.txt``: every stage once, with its seconds."""
    stages = sorted(report["stages"].values(), key=lambda stage: (stage["name"], stage["hash"]))
    return "".join(f"# {s['name']}, {s['seconds']:.0f} s\n{s['command']}\n" for s in stages)
