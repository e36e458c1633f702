"""The tables as data: ``tables/*.yaml`` into frozen, validated records.

A table has columns (what is measured), rows (a W-A-KV setting, a method and what it changes) and
the paper's published value of each cell. A value that our copy of the paper does not hold is
null, and the table or the row says why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from llmqat.config import KV_MODES, QATConfig
from llmqat.errors import ConfigError

METHODS = ("full", "rtn", "smoothquant", "gptq", "awq", "zeroquant", "llm-qat")
TRAINED = "llm-qat"
GENERATED = ("hybrid", "sampled", "greedy")
TEXTS = ("wikitext2", "wikitext103", "c4")
ZERO_SHOT = (
    "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
    "openbookqa",
)  # fmt: skip
"""The eight tasks, in the order of the paper's tables, by lm-eval's names."""
PERPLEXITY = "perplexity/"
FEW_SHOT = ("mmlu", "triviaqa")
COLUMNS = (
    *(f"{PERPLEXITY}{text}" for text in ("c4", "wikitext2")), *ZERO_SHOT, "average", *FEW_SHOT,
)  # fmt: skip
QUANT_FIELDS = (
    "w_quantizer", "a_quantizer", "kv_quantizer", "numerics", "group_size", "weight_scale_dtype",
    "a_group_size", "a_group_axis", "ste_clip",
)  # fmt: skip
KINDS = ("table", "figure")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        key: unique in its table; what ``--only`` matches and files are called.
        label: the method as the paper writes it.
        bits: W-A-KV.
        method: one of :data:`METHODS`.
        smooth: train the model that SmoothQuant smoothed, not the plain one.
        data: what a trained row learns from: a strategy of ``generate-data`` or a text.
        records: a trained row learns from this many times the budget's generated text.
        loss: of ``llmqat train``.
        loss_weights: in the order of the loss's terms; None is 1 each.
        quant: further options of quantization, by the names of QATConfig.
        kv_modes: where the KV cache is quantized; one cell each.
        options: changes to the budget for this row: section, option, value.
        published: model, column, value (None: lost).
        lost: why values are null, where the table does not say.
        note: one line for the report.
    """

    key: str
    label: str
    bits: str
    method: str
    smooth: bool = False
    data: str = "hybrid"
    records: float = 1.0
    loss: str = "logits"
    loss_weights: str | None = None
    quant: Mapping[str, Any] = field(default_factory=dict)
    kv_modes: tuple[str, ...] = ("paper",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    lost: str = ""
    note: str = ""

    @property
    def kv_bits(self) -> int:
        """Bits of the KV cache."""
        return QATConfig.parse(self.bits).kv_bits


@dataclass(frozen=True)
class Table:
    """One table or figure.

    Attributes:
        kind: table or figure.
        source: where in the paper.
        models: the paper's models, one block of published columns each.
        columns: what the paper reports, of :data:`COLUMNS`.
        lost: why published values are null.
        notes: what a reader must know.
        assumptions: figures of the paper that the report computes with.
    """

    name: str
    title: str
    source: str
    models: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: str = "table"
    lost: str = ""
    notes: tuple[str, ...] = ()
    assumptions: Mapping[str, float] = field(default_factory=dict)


def _fail(where: str, message: str) -> ConfigError:
    return ConfigError(f"{where}: {message}")


def _check_keys(where: str, values: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    unknown = sorted(set(values) - set(accepted))
    if unknown:
        raise _fail(where, f"unknown key {unknown[0]!r}; use {', '.join(accepted)}")


def _check_one(where: str, name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise _fail(where, f"{name} {value!r} is not known; use {', '.join(accepted)}")


def _published(
    where: str, values: Any, models: tuple[str, ...], columns: tuple[str, ...]
) -> dict[str, dict[str, float | None]]:
    """Every model and column, null where nothing is given; a list follows the columns."""
    if not isinstance(values, Mapping):
        raise _fail(where, "published must be a mapping from model to values")
    _check_keys(f"{where} published", values, models)
    found: dict[str, dict[str, float | None]] = {}
    for model in models:
        given = values.get(model) or {}
        if isinstance(given, list):
            if len(given) != len(columns):
                raise _fail(where, f"{model} has {len(given)} values for {len(columns)} columns")
            given = dict(zip(columns, given, strict=True))
        _check_keys(f"{where} {model}", given, columns)
        for value in given.values():
            if not (value is None or type(value) in (int, float)):
                raise _fail(where, f"{model}: {value!r} is not a number")
        found[model] = {column: given.get(column) for column in columns}
    return found


def _row(where: str, values: Any, table: Mapping[str, Any]) -> Row:
    if not isinstance(values, Mapping):
        raise _fail(where, "a row must be a mapping")
    merged = {**table.get("defaults", {}), **values}
    label = merged.get("label", "?")
    where = f"{where} row {merged.get('key', label)!r}"
    _check_keys(where, merged, tuple(f.name for f in dataclasses.fields(Row)))
    missing = [name for name in ("label", "bits", "method") if name not in merged]
    if missing:
        raise _fail(where, f"{missing[0]} is missing")
    _check_one(where, "method", merged["method"], METHODS)
    _check_one(where, "data", merged.get("data", "hybrid"), (*GENERATED, *TEXTS))
    records = merged.get("records", 1.0)
    if type(records) not in (int, float) or not 0 < records < math.inf:
        raise _fail(where, f"records must be a number above 0, not {records!r}")
    config = QATConfig.parse(merged["bits"])
    modes = tuple(merged.get("kv_modes", ("paper",)))
    for mode in modes:
        _check_one(where, "kv mode", mode, KV_MODES)
    quant = dict(merged.get("quant") or {})
    _check_keys(f"{where} quant", quant, QUANT_FIELDS)
    if merged["method"] == "full" and (config.quantizes_linears or config.kv.enabled):
        raise _fail(where, "method full means 16-16-16")
    merged["published"] = _published(
        where, merged.get("published") or {}, tuple(table["models"]), tuple(table["columns"])
    )
    merged.setdefault("key", f"{merged['bits']}-{merged['method']}")
    merged |= {"quant": quant, "kv_modes": modes if config.kv.enabled else modes[:1]}
    return Row(**merged)


def parse_table(name: str, values: Any) -> Table:
    """A table from the mapping of its file.

    Raises:
        ConfigError: one line that names the table, the row and the key.
    """
    if not isinstance(values, Mapping):
        raise _fail(name, "expected a mapping")
    fields = tuple(f.name for f in dataclasses.fields(Table) if f.name != "name")
    _check_keys(name, values, (*fields, "defaults"))
    missing = [k for k in ("title", "source", "models", "columns", "rows") if k not in values]
    if missing:
        raise _fail(name, f"{missing[0]} is missing")
    _check_one(name, "kind", values.get("kind", "table"), KINDS)
    for column in values["columns"]:
        _check_one(name, "column", column, COLUMNS)
    rows = tuple(_row(name, row, values) for row in values["rows"])
    keys = [row.key for row in rows]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise _fail(name, f"two rows are called {twice[0]!r}; give one a key")
    table = Table(
        name=name,
        title=values["title"],
        source=values["source"],
        models=tuple(values["models"]),
        columns=tuple(values["columns"]),
        rows=rows,
        kind=values.get("kind", "table"),
        lost=values.get("lost", ""),
        notes=tuple(values.get("notes", ())),
        assumptions=dict(values.get("assumptions") or {}),
    )
    for row in rows:
        null = any(v is None for by in row.published.values() for v in by.values())
        if null and not (row.lost or table.lost):
            raise _fail(f"{name} row {row.key!r}", "a published value is null; lost must say why")
    return table


@cache
def load_tables() -> dict[str, Table]:
    """Every table and figure by name: the paper's tables, its figures, and what it does not have.

    Raises:
        ConfigError: a file is wrong.
    """
    folder = files("llmqat.experiments") / "tables"
    entries = {
        entry.name.removesuffix(".yaml"): entry
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    tables = {}
    for name in sorted(entries, key=lambda n: (*(not n.startswith(kind) for kind in KINDS), n)):
        tables[name] = parse_table(name, yaml.safe_load(entries[name].read_text(encoding="utf-8")))
    return tables


def find_tables(name: str) -> list[Table]:
    """The table of that name, or all of them for "all".

    Raises:
        ConfigError: there is none.
    """
    tables = load_tables()
    if name == "all":
        return list(tables.values())
    if name not in tables:
        raise ConfigError(f"NAME: {name!r} is not an experiment; use all, {', '.join(tables)}")
    return [tables[name]]
