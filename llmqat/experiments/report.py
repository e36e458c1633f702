"""From the records of cells to a report: means over seeds, costs, comparisons with the paper.

:func:`build` makes plain JSON values; ``render.py`` and ``plots.py`` show them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llmqat import io
from llmqat.errors import DataError
from llmqat.experiments.cells import REDUCED
from llmqat.experiments.costs import break_even, cost_lines, row_cost
from llmqat.experiments.origins import agreeing, common, counted, others
from llmqat.experiments.results import DONE, FAILED, read_cells, short
from llmqat.experiments.tables import COLUMNS, PERPLEXITY, TRAINED, Table, load_tables

NOT_RUN = "not run"
FIGURE1_TABLES = ("table1", "table2", "figure1")
Record = dict[str, Any]


def lower_is_better(column: str) -> bool:
    """Whether a small value is a good one."""
    return column.startswith(PERPLEXITY)


def groups(root: Path) -> dict[tuple[str, str, str], list[Record]]:
    """The records by the model's name, its digest, and budget.

    Raises:
        DataError: there is none.
    """
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in read_cells(root):
        key = (record["model"], record["model_sha256"], record["budget"])
        found.setdefault(key, []).append(record)
    if not found:
        raise DataError(f"--output: {root} has no results; run llmqat experiments run first")
    return found


def titles(models: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What to call each model (name, digest): its name, with its digest where two share it."""
    models = set(models)
    count = Counter(name for name, _ in models)
    return {
        (name, digest): f"{name}-{short(digest)}" if count[name] > 1 else name
        for name, digest in models
    }


def primary(columns: Sequence[str]) -> str:
    """The column that bars and comparisons show: perplexity, else the average, else the first."""
    for column in (f"{PERPLEXITY}wikitext2", f"{PERPLEXITY}c4", "average"):
        if column in columns:
            return column
    return columns[0]


def summarize(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, sample standard deviation and number of one column's values; None is infinite."""
    if not values:
        return None
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return {"mean": None, "spread": None, "seeds": len(values)}
    spread = stdev(finite) if len(finite) > 1 else None
    return {"mean": fmean(finite), "spread": spread, "seeds": len(finite)}


def build_table(table: Table, records: Sequence[Record], shape: Mapping[str, Any] | None) -> Record:
    """One table: its rows in order, one entry per KV mode that was run, and per text, generator and
    tasks that were read (:mod:`llmqat.experiments.origins`).
    """
    usual = common(records)
    found = {column for record in records for column in record["values"]}
    columns = [column for column in COLUMNS if column in found] or list(REDUCED)
    rows = []
    for row in table.rows:
        mine = [record for record in records if record["row"] == row.key]
        modes = list(dict.fromkeys(record["kv_mode"] for record in mine))
        default = row.kv_modes[0] if row.kv_bits < 16 else None
        entries = [
            (mode, other, [r for r in mine if r["kv_mode"] == mode and others(r, usual) == other])
            for mode in modes
            for other in distinct(others(r, usual) for r in mine if r["kv_mode"] == mode)
        ]
        for mode, other, cells in entries or [(default, {}, [])]:
            values = {
                column: summarize([r["values"][column] for r in cells if column in r["values"]])
                for column in columns
            }
            errors = [record["error"] for record in cells if record["status"] == FAILED]
            rows.append(
                {
                    "key": row.key,
                    "label": row.label,
                    "bits": row.bits,
                    "method": row.method,
                    "kv_mode": mode,
                    "other_inputs": other,
                    "processes": sorted({record.get("processes", 1) for record in cells}),
                    "status": FAILED if errors else (DONE if cells else NOT_RUN),
                    "error": errors[0] if errors else None,
                    "seeds": sorted(record["seed"] for record in cells),
                    "values": values,
                    "published": row.published,
                    "lost": row.lost or table.lost,
                    "note": row.note,
                    "seconds": sum(record["seconds"] for record in cells),
                    "cost": row_cost(shape, row.bits, mode) if shape else None,
                    "stages": sorted({s["hash"] for r in cells for s in r["stages"]}),
                }
            )
    result = {
        "name": table.name,
        "kind": table.kind,
        "title": table.title,
        "source": table.source,
        "paper_models": list(table.models),
        "paper_columns": list(table.columns),
        "columns": columns,
        "primary": primary(columns),
        "notes": list(table.notes),
        "lost": table.lost,
        "inputs": usual,
        "inputs_by_cells": counted(records),
        "cells_without_inputs": sum("inputs" not in record for record in records),
        "rows": rows,
    }
    compared = {**result, "rows": [row for row in rows if not row["other_inputs"]]}
    return {
        **result,
        "settings": settings(compared["rows"], primary(columns)),
        "order": order(compared),
    }


def distinct(values: Iterable[Record]) -> list[Record]:
    """Each value once; the empty one first, the others as they come."""
    found: list[Record] = []
    for value in values:
        if value not in found:
            found.append(value)
    return sorted(found, key=bool)


def mean_of(row: Mapping[str, Any], column: str) -> float | None:
    """The mean of a cell; infinity where a perplexity is; None where there is none."""
    entry = row["values"].get(column)
    if entry is None:
        return None
    return math.inf if entry["mean"] is None else float(entry["mean"])


def settings(rows: Iterable[Record], column: str) -> list[Record]:
    """Per setting and KV mode: LLM-QAT against the best post-training method of the same table."""
    rows = list(rows)
    full = next((mean_of(row, column) for row in rows if row["method"] == "full"), None)
    sign = 1.0 if lower_is_better(column) else -1.0
    found = []
    for key in dict.fromkeys((r["bits"], r["kv_mode"]) for r in rows if r["method"] != "full"):
        mine = [row for row in rows if (row["bits"], row["kv_mode"]) == key]
        trained = [row for row in mine if row["method"] == TRAINED]
        scored = [
            (value, row["label"])
            for row in mine
            if row["method"] != TRAINED and (value := mean_of(row, column)) is not None
        ]
        qat = mean_of(trained[0], column) if len(trained) == 1 else None
        if qat is None or not scored:
            continue
        best, name = min(scored, key=lambda pair: sign * pair[0])
        rtn = next((value for value, label in scored if label == "RTN"), None)
        found.append(
            {
                "bits": key[0],
                "kv_mode": key[1],
                "qat": _finite(qat),
                "best_ptq": _finite(best),
                "best_ptq_method": name,
                "better": sign * qat < sign * best,
                "gap_closed": _gap(full, rtn, qat),
            }
        )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _gap(full: float | None, rtn: float | None, qat: float) -> float | None:
    """The share of RTN's distance to full precision that training closes."""
    if full is None or rtn is None or not math.isfinite(rtn) or rtn == full:
        return None
    return (rtn - qat) / (rtn - full) if math.isfinite(qat) else None


def order(table: Mapping[str, Any]) -> list[Record]:
    """How many pairs of rows are ordered as in the paper, per paper model, by the first column that
    both have, or perplexity against the paper's average.
    """
    shared = [c for c in table["columns"] if c in table["paper_columns"]]
    ours = primary(shared or table["columns"])
    theirs = ours if shared else primary(table["paper_columns"])
    found = []
    for model in table["paper_models"]:
        points = []
        for row in table["rows"]:
            mine, paper = mean_of(row, ours), row["published"][model][theirs]
            if mine is not None and paper is not None:
                points.append((_rank(ours, mine), _rank(theirs, paper)))
        pairs = [(a, b) for a, b in combinations(points, 2) if a[1] != b[1]]
        if pairs:
            same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
            found.append(
                {"model": model, "ours": ours, "paper": theirs, "same": same, "pairs": len(pairs)}
            )
    return found


def _rank(column: str, value: float) -> float:
    """Smaller is better; infinity as a number that can be compared."""
    return min(value, 1e300) if lower_is_better(column) else -value


def build(
    model: str,
    budget: str,
    records: Sequence[Record],
    *,
    title: str | None = None,
    speeds: Mapping[str, float] | None = None,
) -> Record:
    """The report of one model and budget as JSON values.

    Args:
        title: what the model is called, where its name is not enough.
    """
    shape = next((r["shape"] for r in records if r.get("shape")), None)
    stages = {
        s["hash"]: s | {"command": portable(s["command"])} for r in records for s in r["stages"]
    }
    tables = []
    for name, table in load_tables().items():
        mine = [record for record in records if record["table"] == name]
        entry = build_table(table, mine, shape) | {"overrides": changes(mine)}
        if table.assumptions:
            entry["costs"] = costs(table, speeds)
        tables.append(entry)
    _note_figure1(tables)
    versions = {name: value for s in stages.values() for name, value in s["versions"].items()}
    stand_ins: dict[str, str] = {}
    for record in records:
        stand_ins |= record.get("stand_ins", {})
    return {
        "model": model,
        "title": title or model,
        "model_sha256": sorted({r["model_sha256"] for r in records}),
        "budget": budget,
        "stand_ins": stand_ins,
        "cells": {status: sum(r["status"] == status for r in records) for status in (DONE, FAILED)},
        "seeds": sorted({record["seed"] for record in records}),
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "versions": versions,
        "shape": shape,
        "tables": tables,
        "stages": stages,
    }


def _note_figure1(tables: Sequence[Record]) -> None:
    """Say in Figure 1's notes which tables its picture leaves out."""
    kept = [table["name"] for table in figure1_tables(tables)]
    left = [name for name in FIGURE1_TABLES if name not in kept]
    if left:
        figure = next(table for table in tables if table["name"] == "figure1")
        note = f"The picture leaves out {', '.join(left)}: the cells there read other inputs."
        figure["notes"] = [*figure["notes"], note]


def figure1_tables(tables: Iterable[Record]) -> list[Record]:
    """The tables whose points Figure 1 shows: none that read other inputs than a larger one."""
    mine = [table for table in tables if table["name"] in FIGURE1_TABLES]
    kept = agreeing(sorted(mine, key=_cells, reverse=True))
    return [table for table in mine if table in kept]


def _cells(table: Record) -> int:
    return sum(len(row["seeds"]) for row in table["rows"])


def changes(records: Iterable[Record]) -> list[str]:
    """What `run --set` changed of the budget in cells of a table, and in how many if not all."""
    records = list(records)
    counts = Counter(change for record in records for change in record.get("overrides", []))
    return [
        change if count == len(records) else f"{change} ({count} of {len(records)} cells)"
        for change, count in sorted(counts.items())
    ]


def portable(command: str) -> str:
    """A command with paths below the working directory as they are from there: a report is read on
    other machines.
    """
    return command.replace(f"{Path.cwd()}/", "")


def costs(table: Table, speeds: Mapping[str, float] | None) -> Record:
    """Figure 4's lines, their totals and where they cross."""
    lines = cost_lines(table.assumptions, speeds)
    count = table.assumptions["inferences"]
    full = lines[0]
    return {
        "inferences": count,
        "lines": [
            {
                "label": line.label,
                "setting": line.setting,
                "speed": line.source,
                "fixed_days": line.fixed,
                "days_per_inference": line.days_per_inference,
                "inference_days": line.days_per_inference * count,
                "total_days": line.days(count),
                "published_days": line.published,
                "cheaper_from": break_even(line, full) if line is not full else None,
            }
            for line in lines
        ],
    }


def write_report(
    root: Path,
    folder: Path,
    *,
    model: str | None = None,
    budget: str | None = None,
    speeds: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write ``<folder>/<model>-<budget>/{report.md,report.json,commands.txt,*.png}`` for every
    model and budget that was run (or those asked for); returns the Markdown files. Two models of
    one name have their digests in the folders' names.

    Raises:
        DataError: nothing was run. ConfigError: matplotlib is missing.
    """
    from llmqat.experiments.plots import draw
    from llmqat.experiments.render import commands, render

    found = groups(root)
    names = titles((name, digest) for name, digest, _ in found)
    chosen = {
        (names[name, digest], name, size): records
        for (name, digest, size), records in found.items()
        if model in (None, name, names[name, digest]) and budget in (None, size)
    }
    if not chosen:
        raise DataError(f"--model, --budget: {root} has no results of {model} at {budget}")
    written = []
    for (title, name, size), records in chosen.items():
        report = build(name, size, records, title=title, speeds=speeds)
        target = io.make_dir(folder / f"{title}-{size}")
        pictures = draw(report, target)
        io.write_json(target / "report.json", report)
        io.write_text(target / "commands.txt", commands(report))
        io.write_text(target / "report.md", render(report, pictures))
        written.append(target / "report.md")
    return written
