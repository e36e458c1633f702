"""What a cell came out as: one small JSON file each, which the report reads.

``cells/<model>/<budget>/<table>/<row>@<kv mode>#<seed>.json``; a later run of the same cell
replaces it, so that a failed one turns green. A second model of the same name has a folder of its
own, ``cells/<model>-<digest>``.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.errors import DataError
from llmqat.experiments.cells import Cell
from llmqat.experiments.stages import Stage, Store
from llmqat.experiments.tables import PERPLEXITY

DONE, FAILED = "done", "failed"
PERCENT = 100.0


def value_of(column: str, result: Mapping[str, Any]) -> float:
    """The number of a column in the result of its evaluation; perplexity may be infinite.

    Raises:
        DataError: the result does not hold it.
    """
    if column.startswith(PERPLEXITY):
        found = result.get("perplexity")
        if found is None and "nll" in result:
            return math.inf
    elif column == "average":
        found = result.get("average")
    else:
        task = result.get("tasks", {}).get(column, {})
        found = task.get(task.get("metric"))
    if not isinstance(found, int | float):
        raise DataError(f"{column}: the evaluation's result does not hold it")
    return float(found) if column.startswith(PERPLEXITY) else PERCENT * float(found)


@dataclass(frozen=True)
class CellLog:
    """Writes the records of cells.

    Attributes:
        root: the output folder.
        model: name and digest. budget: its name. context: what else the report should say.
    """

    root: Path
    model: str
    digest: str
    budget: str
    context: Mapping[str, Any]

    def path(self, cell: Cell) -> Path:
        """The file of a cell."""
        place = Path(self.budget) / cell.table.name / f"{cell.name.partition('/')[2]}.json"
        cells = self.root / "cells"
        own = cells / f"{self.model}-{short(self.digest)}" / place
        named = cells / self.model / place
        return own if own.is_file() or self._is_of_another_model(named) else named

    def _is_of_another_model(self, path: Path) -> bool:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return bool(record["model_sha256"] != self.digest)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def write(
        self,
        cell: Cell,
        store: Store,
        results: Mapping[str, Any],
        errors: Mapping[str, str],
    ) -> str:
        """Write the record; returns why the cell failed, "" if it did not."""
        values: dict[str, Any] = {}
        errors = dict(errors)
        for column, result in results.items():
            try:
                value = value_of(column, result)
            except DataError as error:
                errors[column] = str(error)
            else:
                values[column] = value if math.isfinite(value) else None
        reason = cell.error or next(iter(errors.values()), "")
        stages = [stage for stage in cell.stages if store.is_done(stage)]
        record = {
            "cell": cell.name,
            "table": cell.table.name,
            "row": cell.row.key,
            "kv_mode": cell.kv_mode,
            "seed": cell.seed,
            "model": self.model,
            "model_sha256": self.digest,
            "budget": self.budget,
            "inputs": cell.inputs,
            "processes": _processes(stages, store),
            "status": FAILED if reason else DONE,
            "error": reason or None,
            "values": values,
            "errors": errors,
            "stages": [_stage_record(stage, store) for stage in stages],
            "seconds": round(sum(float(store.record(stage)["seconds"]) for stage in stages), 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **self.context,
        }
        path = self.path(cell)
        io.make_dir(path.parent)
        io.write_json(path, record)
        return reason


def short(digest: str) -> str:
    """A digest as people compare it."""
    return digest[:8]


def _processes(stages: Iterable[Stage], store: Store) -> int:
    """How many processes trained; 1 where nothing was trained."""
    results = [store.record(stage)["result"] for stage in stages if stage.command == "train"]
    return max((result.get("processes", 1) for result in results), default=1)


def _stage_record(stage: Stage, store: Store) -> dict[str, Any]:
    record = store.record(stage)
    return {key: record.get(key) for key in ("name", "hash", "command", "seconds", "versions")} | {
        "folder": stage.folder
    }


def read_cells(root: Path) -> Iterator[dict[str, Any]]:
    """Every cell's record, in the order of their paths.

    Raises:
        DataError: one is damaged.
    """
    for path in sorted((root / "cells").glob("*/*/*/*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record["table"], record["row"], record["values"], record["status"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged; delete it and run again") from error
        yield record
