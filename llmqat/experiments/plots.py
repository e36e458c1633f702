"""The pictures of a report: bars of every table, Figure 1 and Figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmqat.errors import ConfigError
from llmqat.experiments.report import figure1_tables, lower_is_better, mean_of
from llmqat.io import atomic_path

COLORS = {
    "full": "#555555", "rtn": "#c9a227", "smoothquant": "#7a9e7e", "gptq": "#b56576",
    "awq": "#8d6a9f", "zeroquant": "#b08968", "llm-qat": "#2f6690",
}  # fmt: skip
MARKERS = {"full": "*", "rtn": "v", "smoothquant": "s", "gptq": "P", "llm-qat": "o"}
NAMES = {
    "full": "full precision", "rtn": "RTN", "smoothquant": "SmoothQuant", "gptq": "GPTQ",
    "awq": "AWQ", "zeroquant": "ZeroQuant", "llm-qat": "LLM-QAT",
}  # fmt: skip
GRIDS = ("table1", "table2", "table6", "table7")
"""Tables whose rows are settings times methods: bars are grouped by setting."""
DPI = 130
WIDE = 20.0
"""From this ratio of largest to smallest on, perplexities are drawn on a logarithmic axis."""
NEAR = 0.03
"""Points of Figure 1 this close, as a share of x and of the range of y, share a label."""
Record = Mapping[str, Any]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots: matplotlib is missing; pip install 'llmqat[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    pyplot.close(figure)
    return path.name


def _setting(row: Record) -> str:
    return f"{row['bits']}\n{row['kv_mode']}" if row["kv_mode"] else str(row["bits"])


def axis_label(column: str) -> str:
    """What an axis of this column says."""
    if lower_is_better(column):
        return f"perplexity, {column.partition('/')[2]} (lower is better)"
    return f"{column}, % (higher is better)"


def _scored(table: Record, column: str) -> list[tuple[Record, float]]:
    """Rows with a finite value that read what the others of their table read."""
    rows = (row for row in table["rows"] if not row["other_inputs"])
    found = [(row, mean_of(row, column)) for row in rows]
    return [(row, value) for row, value in found if value is not None and math.isfinite(value)]


def _set_scale(axes: Any, which: str, values: list[float], column: str) -> None:
    if lower_is_better(column) and max(values) > WIDE * min(values):
        getattr(axes, f"set_{which}scale")("log")


def bars(pyplot: Any, table: Record, folder: Path) -> str | None:
    """Bars per row, grouped by setting where the table is a grid; None without values."""
    column = table["primary"]
    scored = _scored(table, column)
    if not scored:
        return None
    draw_bars = _grouped if table["name"] in GRIDS else _rows
    return _save(pyplot, draw_bars(pyplot, table, scored, column), folder / f"{table['name']}.png")


def _grouped(pyplot: Any, table: Record, scored: list[tuple[Record, float]], column: str) -> Any:
    settings = list(dict.fromkeys(_setting(row) for row, _ in scored if row["method"] != "full"))
    used = {row["method"] for row, _ in scored}
    methods = [method for method in COLORS if method in used and method != "full"]
    figure, axes = pyplot.subplots(
        figsize=(max(6.0, 1.0 * len(settings) + 2), 4.0), layout="constrained"
    )
    width = 0.8 / max(1, len(methods))
    present = {
        s: [m for m in methods if any(_setting(r) == s and r["method"] == m for r, _ in scored)]
        for s in settings
    }
    for method in methods:
        mine = [(row, value) for row, value in scored if row["method"] == method]
        places = []
        for row, _ in mine:
            here = present[_setting(row)]
            offset = (here.index(method) - (len(here) - 1) / 2) * width
            places.append(settings.index(_setting(row)) + offset)
        drawn = axes.bar(
            places, [value for _, value in mine], width, color=COLORS[method], label=NAMES[method],
            yerr=[row["values"][column]["spread"] or 0.0 for row, _ in mine],
            error_kw={"linewidth": 0.8},
        )  # fmt: skip
        axes.bar_label(drawn, fmt=lambda v: f"{v:.0f}" if v >= 100 else f"{v:.1f}", fontsize=6)
    for row, value in scored:
        if row["method"] == "full":
            label = f"full precision, {value:.1f}"
            axes.axhline(value, color=COLORS["full"], linestyle="--", linewidth=1, label=label)
    axes.set_xticks(range(len(settings)), settings, fontsize=8)
    axes.margins(x=0.01, y=0.12)
    axes.set_ylabel(axis_label(column))
    _set_scale(axes, "y", [value for _, value in scored], column)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_title(f"{table['name']}: {table['title']}", fontsize=10)
    return figure


def _rows(pyplot: Any, table: Record, scored: list[tuple[Record, float]], column: str) -> Any:
    quantized = [row for row, _ in scored if row["method"] != "full"]
    several = len({(row["bits"], row["kv_mode"]) for row in quantized}) > 1
    labels, values, colors, errors = [], [], [], []
    for row, value in scored:
        mode = f" {row['kv_mode']}" if row["kv_mode"] else ""
        labels.append(f"{row['label']}, {row['bits']}{mode}" if several else row["label"])
        values.append(value)
        colors.append(COLORS[row["method"]])
        errors.append(row["values"][column]["spread"] or 0.0)
    figure, axes = pyplot.subplots(figsize=(7.5, 0.32 * len(labels) + 1.2), layout="constrained")
    drawn = axes.barh(range(len(labels)), values, color=colors, xerr=errors,
                      error_kw={"linewidth": 0.8})  # fmt: skip
    axes.bar_label(drawn, fmt=lambda v: f"{v:,.0f}" if v >= 1000 else f"{v:.1f}", fontsize=7,
                   padding=2)  # fmt: skip
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(axis_label(column))
    _set_scale(axes, "x", values, column)
    axes.margins(x=0.12)
    axes.set_title(f"{table['name']}: {table['title']}", fontsize=10)
    return figure


def _points(report: Record) -> tuple[str, list[tuple[Record, float]]]:
    """Figure 1's points: every setting and method of the grids, each once, by the column that most
    of them have.
    """
    tables = figure1_tables(report["tables"])
    for column in ("average", "perplexity/wikitext2", "perplexity/c4"):
        seen: dict[tuple[str, str, str | None], tuple[Record, float]] = {}
        for table in tables:
            for row, value in _scored(table, column):
                if row["cost"]:
                    seen.setdefault((row["bits"], row["method"], row["kv_mode"]), (row, value))
        if seen:
            return column, list(seen.values())
    return "average", []


def _names(points: list[tuple[Record, float]], key: str) -> list[tuple[str, tuple[float, float]]]:
    """Labels of full precision and LLM-QAT, each setting once; neighbours share one label."""
    best: dict[str, tuple[float, float]] = {}
    for row, value in sorted(points, key=lambda pair: pair[1]):
        if row["method"] in ("full", "llm-qat"):
            bits = row["bits"] if key == "total_gib" else "-".join(row["bits"].split("-")[:2])
            best.setdefault(bits, (row["cost"][key], value))
    reach = NEAR * (max(y for _, y in points) - min(y for _, y in points))
    joined: list[tuple[str, tuple[float, float]]] = []
    for bits, (x, y) in best.items():
        for i, (text, place) in enumerate(joined):
            if math.isclose(x, place[0], rel_tol=NEAR) and abs(y - place[1]) <= reach:
                joined[i] = (f"{text}, {bits}", place)
                break
        else:
            joined.append((bits, (x, y)))
    return joined


def figure1(pyplot: Any, report: Record, folder: Path) -> str | None:
    """Accuracy or perplexity against bytes and against operations; None without values."""
    column, points = _points(report)
    if not points:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for axes, key, label in (
        (panels[0], "total_gib", "GiB of weights and 2,048 tokens of KV cache"),
        (panels[1], "ops", "OPs (MACs x weight bits x activation bits, 2,048 tokens)"),
    ):
        for method in dict.fromkeys(row["method"] for row, _ in points):
            mine = [(row["cost"][key], value) for row, value in points if row["method"] == method]
            axes.scatter(
                *zip(*mine, strict=True), s=60 if method == "full" else 34, alpha=0.85,
                color=COLORS[method], marker=MARKERS.get(method, "D"), label=NAMES[method],
            )  # fmt: skip
        for text, place in _names(points, key):
            axes.annotate(text, place, fontsize=7, xytext=(4, -8), textcoords="offset points")
        axes.set_xlabel(label)
        _set_scale(axes, "y", [value for _, value in points], column)
    panels[1].set_xscale("log")
    panels[1].xaxis.set_minor_formatter(pyplot.NullFormatter())
    panels[0].set_ylabel(axis_label(column))
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report['title']}: quality against size and operations", fontsize=11)
    return _save(pyplot, figure, folder / "figure1.png")


def figure4(pyplot: Any, table: Record, folder: Path) -> str:
    """Total cost over the number of inferences."""
    costs = table["costs"]
    figure, axes = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    counts = [10 ** (3 + i / 20) for i in range(101)]
    method = {"full precision": "full", "post-training": "smoothquant", "LLM-QAT": "llm-qat"}
    for line in costs["lines"]:
        days = [line["fixed_days"] + line["days_per_inference"] * count for count in counts]
        base = line["label"].partition(",")[0]
        axes.plot(
            counts, days, color=COLORS[method[base]],
            linestyle="--" if "measured" in line["label"] else "-",
            label=f"{line['label']} {line['setting']}: {line['total_days']:,.0f} days",
        )  # fmt: skip
    axes.axvline(costs["inferences"], color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("inferences of LLaMA-30B")
    axes.set_ylabel("A100 days, training included")
    axes.legend(frameon=False, fontsize=8, title="at 5 million inferences", title_fontsize=8)
    axes.set_title("figure4: total cost, from the paper's figures", fontsize=10)
    return _save(pyplot, figure, folder / "figure4.png")


def draw(report: Record, folder: Path) -> dict[str, list[str]]:
    """All pictures; file names by table.

    Raises:
        ConfigError: matplotlib is missing.
    """
    pyplot = _pyplot()
    pictures: dict[str, list[str]] = {}
    for table in report["tables"]:
        if table["name"] == "figure1":
            name = figure1(pyplot, report, folder)
        elif "costs" in table:
            name = figure4(pyplot, table, folder)
        else:
            name = bars(pyplot, table, folder)
        pictures[table["name"]] = [name] if name else []
    return pictures
