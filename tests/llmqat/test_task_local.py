"""Rows from files, and one line for whatever is wrong with them."""

import json

import pytest

from llmqat.errors import DataError
from llmqat.eval.tasks.catalog import TASKS
from llmqat.eval.tasks.local import by_subject, read_rows, resolve_tasks_dir

ROW = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


def _write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_ten_of_each(task):
    rows = read_rows(resolve_tasks_dir("samples"), task, TASKS[task], TASKS[task].shots)
    assert len(rows.questions) == 10
    if task == "mmlu":
        subjects = by_subject(rows, 5)
        assert [len(part.questions) for part in subjects.values()] == [5, 5]
        assert [len(part.examples) for part in subjects.values()] == [5, 5]
    else:
        assert len(rows.examples) == TASKS[task].shots


def test_examples_and_digest(tmp_path):
    _write(tmp_path / "piqa.jsonl", [ROW])
    plain = read_rows(tmp_path, "piqa", TASKS["piqa"], 0)
    _write(tmp_path / "piqa.fewshot.jsonl", [ROW, ROW])
    assert read_rows(tmp_path, "piqa", TASKS["piqa"], 0) == plain
    shown = read_rows(tmp_path, "piqa", TASKS["piqa"], 2)
    assert shown.examples == [ROW, ROW] and shown.sha256 != plain.sha256
    with pytest.raises(DataError, match=r"has 2 examples; --shots 3 needs as many"):
        read_rows(tmp_path, "piqa", TASKS["piqa"], 3)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="--tasks-dir: nowhere is not a folder"):
        resolve_tasks_dir("nowhere")
    spec = TASKS["piqa"]
    with pytest.raises(DataError, match=r"no piqa.jsonl in .*: export the data set there"):
        read_rows(tmp_path, "piqa", spec, 0)
    path = tmp_path / "piqa.jsonl"
    for text, message in (
        ("", "holds no question"),
        ("{", "line 1 is not JSON"),
        ("\n[1]", "line 2: not an object"),
        (json.dumps({**ROW, "label": 2}), r"line 1: label is 2; use 0\.\.1"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path, "piqa", spec, 0)
    path.write_text(json.dumps(ROW))
    with pytest.raises(DataError, match=r"no piqa.fewshot.jsonl"):
        read_rows(tmp_path, "piqa", spec, 1)


def test_mmlu_without_examples_of_a_subject(tmp_path):
    row = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}
    _write(tmp_path / "mmlu.jsonl", [{**row, "subject": "anatomy"}])
    _write(tmp_path / "mmlu.fewshot.jsonl", [{**row, "subject": "virology"}])
    rows = read_rows(tmp_path, "mmlu", TASKS["mmlu"], 5)
    with pytest.raises(DataError, match="0 examples of anatomy; --shots 5"):
        by_subject(rows, 5)
