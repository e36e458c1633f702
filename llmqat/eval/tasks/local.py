"""Questions from files: ``NAME.jsonl`` holds those of a task, ``NAME.fewshot.jsonl`` the examples
that stand before them. Fields are those of the data sets on the Hub (`docs/evaluation.md`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llmqat.errors import DataError
from llmqat.eval.tasks.catalog import Row, TaskSpec

SAMPLES = "samples"
"""As `--tasks-dir`: the questions that ship with the package."""


@dataclass(frozen=True)
class LocalRows:
    """The questions of one task.

    Attributes:
        questions: rows to be answered.
        examples: rows for few-shot prompts; may be empty.
        sha256: of the files, for `--resume`.
    """

    questions: list[Row]
    examples: list[Row]
    sha256: str


def resolve_tasks_dir(name: str) -> Path:
    """The folder behind `--tasks-dir`; DataError where it is none."""
    path = Path(__file__).parent / SAMPLES if name == SAMPLES else Path(name)
    if not path.is_dir():
        raise DataError(
            f"--tasks-dir: {name} is not a folder; give one with files such as piqa.jsonl, or"
            f" {SAMPLES}"
        )
    return path


def read_rows(folder: Path, task: str, spec: TaskSpec, shots: int) -> LocalRows:
    """The checked rows of one task.

    Raises:
        DataError: a file is missing, unreadable or malformed, or has too few examples.
    """
    digest = hashlib.sha256()
    path, extra = folder / f"{task}.jsonl", folder / f"{task}.fewshot.jsonl"
    questions = _read(path, spec, digest)
    examples = _read(extra, spec, digest) if shots else []
    if task != "mmlu" and len(examples) < shots:
        raise DataError(f"{extra} has {len(examples)} examples; --shots {shots} needs as many")
    return LocalRows(questions, examples, digest.hexdigest())


def by_subject(rows: LocalRows, shots: int) -> dict[str, LocalRows]:
    """MMLU's questions and examples, subject by subject; DataError where examples are missing."""
    subjects = {}
    for subject in dict.fromkeys(row["subject"] for row in rows.questions):
        examples = [row for row in rows.examples if row["subject"] == subject]
        if len(examples) < shots:
            raise DataError(
                f"mmlu.fewshot.jsonl: {len(examples)} examples of {subject}; --shots {shots} needs"
                " as many"
            )
        questions = [row for row in rows.questions if row["subject"] == subject]
        subjects[subject] = LocalRows(questions, examples, rows.sha256)
    return subjects


def _read(path: Path, spec: TaskSpec, digest: hashlib._Hash) -> list[Row]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"no {path.name} in {path.parent}: export the data set there, one JSON object a line"
        ) from error
    digest.update(data)
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error
        wrong = spec.check(row) if isinstance(row, dict) else "not an object"
        if wrong:
            raise DataError(f"{path} line {number}: {wrong}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no question")
    return rows
