"""Cells: one row of a table on one model, with one seed, as a chain of stages.

:func:`chain` is the whole recipe: data -> smoothing -> training or quantization -> evaluation. It
is a pure function of the row, the budget, the inputs and the seed. Options that have the command's
default are left out, so that a row that changes nothing shares its stages with every other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from llmqat.config import QATConfig
from llmqat.errors import ConfigError, DataError
from llmqat.experiments.budgets import Budget
from llmqat.experiments.inputs import Inputs
from llmqat.experiments.stages import Source, Stage, in_order
from llmqat.experiments.tables import (
    FEW_SHOT,
    GENERATED,
    PERPLEXITY,
    TRAINED,
    ZERO_SHOT,
    Row,
    Table,
)

REDUCED = (f"{PERPLEXITY}wikitext2",)
"""What a table of task accuracies is reduced to where the budget measures perplexity only."""
SHOTS = 5
"""MMLU and TriviaQA (Table 6)."""
DATA_SEED = 0
"""All seeds train on the same generated text: a seed decides calibration samples and data order."""
JOURNALED = ("gptq", "awq", "zeroquant")
_ROLES = {
    "generate-data": {"model": "generator"},
    "train": {"data": "train text {data}"},
    "eval": {"tasks_dir": "tasks"},
}
"""Options that are read from outside, and what they are called in a cell's record."""
_WEIGHT = {"eval": 0, "quantize": 1, "generate-data": 1, "train": 3}


@dataclass(frozen=True)
class Cell:
    """One row, one KV mode, one seed.

    Attributes:
        columns: column and the evaluation that gives it.
        error: why there is nothing to run, if so.
    """

    table: Table
    row: Row
    kv_mode: str | None
    seed: int
    columns: Mapping[str, Stage] = field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        """``table2/4-8-4-rtn@paper#0``: what ``--only`` matches."""
        mode = f"@{self.kv_mode}" if self.kv_mode else ""
        return f"{self.table.name}/{self.row.key}{mode}#{self.seed}"

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return in_order(self.columns.values())

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of all that is read beside the model, by what it serves as: ``generator``,
        ``train text c4``, ``text wikitext2``, ``tasks``.
        """
        found = {}
        for stage in self.stages:
            options = dict(stage.options)
            for option, role in _ROLES.get(stage.command, {}).items():
                if isinstance(source := options.get(option), Source):
                    found[role.format(data=self.row.data)] = source.digest
        for column, stage in self.columns.items():
            if isinstance(source := dict(stage.options).get("text"), Source):
                found[f"text {column.removeprefix(PERPLEXITY)}"] = source.digest
        return found


def measured(table: Table, budget: Budget) -> tuple[str, ...]:
    """The columns of a table that a budget measures: the paper's, or perplexity instead of them."""
    kinds = {column: "perplexity" if column.startswith(PERPLEXITY) else "tasks" for column in
             table.columns}  # fmt: skip
    kept = tuple(column for column, kind in kinds.items() if kind in budget.metrics)
    return kept or REDUCED


def _options(values: Mapping[str, Any], inputs: Inputs) -> tuple[tuple[str, Any], ...]:
    common: dict[str, Any] = {}
    if inputs.device != "cpu":
        common["device"] = inputs.device
    if inputs.threads is not None:
        common["threads"] = inputs.threads
    return (*values.items(), *common.items())


def _quantization(row: Row, kv_mode: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"bits": row.bits}
    if kv_mode is not None:
        options["kv_mode"] = kv_mode
    return options | dict(row.quant)


def _generate(strategy: str, budget: Budget, inputs: Inputs, records: float = 1.0) -> Stage:
    values = {"model": inputs.generator, "strategy": strategy, "seed": DATA_SEED}
    values |= budget.options("generate")
    for count in values.keys() & {"num_records", "num_tokens"}:
        values[count] = max(1, round(values[count] * records))
    return Stage(f"generate-{strategy}", "generate-data", _options(values, inputs))


def _calibrated(
    method: str, budget: Budget, inputs: Inputs, seed: int, quantization: Mapping[str, Any]
) -> Stage:
    """``quantize``; without ``quantization`` the smoothed float model."""
    values: dict[str, Any] = {"model": inputs.model, "method": method}
    values |= quantization or {"keep_float": True}
    values |= {"calibration": _generate("hybrid", budget, inputs), "seed": seed}
    values |= budget.options("calibrate", method)
    name = f"{method}-{quantization['bits']}" if quantization else "smooth"
    return Stage(name, "quantize", _options(values, inputs), resumes=method in JOURNALED)


def _train(row: Row, budget: Budget, inputs: Inputs, seed: int, quant: Mapping[str, Any]) -> Stage:
    values: dict[str, Any] = {"model": inputs.model}
    if row.smooth:
        values["model"] = _calibrated("smoothquant", budget, inputs, seed, {})
        values["teacher"] = inputs.model
    values["data"] = _training_data(row, budget, inputs)
    values |= quant
    values["loss"] = row.loss
    if row.loss_weights is not None:
        values["loss_weights"] = row.loss_weights
    values["seed"] = seed
    values |= budget.options("train")
    options = _options(values, inputs)
    return Stage(f"train-{row.bits}", "train", options, resumes=True, launch=inputs.launch)


def _training_data(row: Row, budget: Budget, inputs: Inputs) -> Stage | Source:
    if row.data in GENERATED:
        return _generate(row.data, budget, inputs, row.records)
    if row.data not in inputs.train_texts:
        raise DataError(inputs.missing.get(row.data, f"--train-text {row.data}=FILE is not given"))
    return inputs.train_texts[row.data]


def student(
    row: Row, budget: Budget, inputs: Inputs, seed: int, kv_mode: str | None
) -> dict[str, Any]:
    """The options of ``eval`` that name the model under test: a source or stage, and whether it is
    rounded to nearest there.

    Raises:
        DataError: the row's training text is missing.
    """
    quant = _quantization(row, kv_mode)
    if row.method == "full":
        return {"model": inputs.model}
    if row.method == "rtn":
        return {"model": inputs.model, **quant}
    if row.method == "smoothquant":
        # The smoothed model is the same for all settings: rounding it here saves a folder for each.
        return {"model": _calibrated("smoothquant", budget, inputs, seed, {}), **quant}
    if row.method == TRAINED:
        return {"model": _train(row, budget, inputs, seed, quant)}
    return {"model": _calibrated(row.method, budget, inputs, seed, quant)}


def _evaluate(
    column: str, model: Mapping[str, Any], budget: Budget, inputs: Inputs, name: str
) -> Stage | None:
    """The stage that gives a column; None where its text is not there."""
    values = dict(model)
    if column.startswith(PERPLEXITY):
        text = column.removeprefix(PERPLEXITY)
        if text not in inputs.texts:
            return None
        values |= {"text": inputs.texts[text], **budget.options("evaluate")}
        return Stage(f"eval-{name}-{text}", "eval", _options(values, inputs), writes=False)
    tasks = "zero-shot" if column in (*ZERO_SHOT, "average") else column
    values["tasks"] = tasks
    if column in FEW_SHOT:
        values["shots"] = SHOTS
    if inputs.tasks_dir is not None:
        values["tasks_dir"] = inputs.tasks_dir
    values |= budget.options("tasks")
    return Stage(f"eval-{name}-{tasks}", "eval", _options(values, inputs), writes=False)


def chain(
    row: Row, columns: Sequence[str], budget: Budget, inputs: Inputs, seed: int, kv_mode: str | None
) -> dict[str, Stage]:
    """The evaluation of each column; everything before hangs on them. Columns whose text is not
    there are left out.

    Raises:
        DataError: the row's training text is missing.
    """
    budget = budget.override(row.options)
    model = student(row, budget, inputs, seed, kv_mode)
    name = row.method if row.method == "full" else f"{row.bits}-{row.method}"
    stages = {column: _evaluate(column, model, budget, inputs, name) for column in columns}
    return {column: stage for column, stage in stages.items() if stage is not None}


def expand(
    tables: Sequence[Table],
    budget: Budget,
    inputs: Inputs,
    *,
    seeds: Sequence[int] = (0,),
    kv_modes: Sequence[str] | None = None,
    only: str | None = None,
) -> list[Cell]:
    """The cells of some tables. A row without any randomness has one cell, whatever the seeds.

    Args:
        kv_modes: of rows with a quantized KV cache; None is what each row says.
        only: a pattern (``*``, ``?``) that a cell's name must contain.

    Raises:
        ConfigError: nothing is left to run.
    """
    cells = []
    for table in tables:
        columns = measured(table, budget)
        for row in table.rows:
            quantized = QATConfig.parse(row.bits).kv.enabled
            modes: Sequence[str | None] = (kv_modes or row.kv_modes) if quantized else (None,)
            for mode in modes:
                cells += _of_row(table, row, columns, budget, inputs, seeds, mode)
    if only is not None:
        cells = [cell for cell in cells if fnmatchcase(cell.name, f"*{only}*")]
        if not cells:
            raise ConfigError(f"--only: no cell's name contains {only!r}; see --dry-run for names")
    return cells


def _of_row(
    table: Table,
    row: Row,
    columns: Sequence[str],
    budget: Budget,
    inputs: Inputs,
    seeds: Sequence[int],
    mode: str | None,
) -> list[Cell]:
    cells: list[Cell] = []
    for seed in seeds:
        try:
            found = chain(row, columns, budget, inputs, seed, mode)
        except DataError as error:
            return [Cell(table, row, mode, seed, error=str(error))]
        if cells and {s.hash for s in found.values()} == {
            s.hash for s in cells[0].columns.values()
        }:
            break
        cells.append(Cell(table, row, mode, seed, found))
    return cells


def by_need(cells: Sequence[Cell]) -> list[Cell]:
    """Cheap cells first (full precision, RTN, then calibration, then training), else as given."""

    def weight(cell: Cell) -> int:
        return max((_WEIGHT.get(stage.command, 2) for stage in cell.stages), default=0)

    return sorted(cells, key=weight)
