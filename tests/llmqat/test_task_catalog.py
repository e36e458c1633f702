"""Names of tasks, and what is wrong with a row."""

import copy
import json

import pytest

from llmqat.errors import ConfigError
from llmqat.eval.tasks import TASKS, ZERO_SHOT, resolve_tasks_dir, task_names


def _first(task):
    path = resolve_tasks_dir("samples") / f"{task}.jsonl"
    return json.loads(path.read_text().splitlines()[0])


def test_names():
    assert task_names(["zero-shot"]) == ZERO_SHOT
    assert len(ZERO_SHOT) == 8 and task_names(["all"]) == (*ZERO_SHOT, "mmlu", "triviaqa")
    assert task_names(["piqa, boolq", "piqa"]) == ("piqa", "boolq")
    for asked in (["chess"], [""], []):
        with pytest.raises(ConfigError, match="--tasks: "):
            task_names(asked)


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_field(task):
    check, row = TASKS[task].check, _first(task)
    assert check(row) is None
    for name in set(row) - {"id", "question_id"}:
        assert check({key: value for key, value in row.items() if key != name})


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("boolq", {"label": 2}, "label is 2; use 0..1"),
        ("boolq", {"label": True}, "label is True, of the wrong type"),
        ("piqa", {"label": "0"}, "wrong type"),
        ("social_iqa", {"label": "0"}, "label is '0'; use 1..3"),
        ("hellaswag", {"endings": ["one", ""]}, "at least two texts"),
        ("hellaswag", {"label": "4"}, "use 0..3"),
        ("winogrande", {"answer": "3"}, "use 1..2"),
        ("winogrande", {"sentence": "no gap"}, "must have a '_'"),
        ("arc_easy", {"answerKey": "E"}, "answerKey is 'E', not one of A, B, C, D"),
        ("openbookqa", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "as many"),
        ("mmlu", {"choices": ["a", "b", "c"]}, "four texts"),
        ("mmlu", {"answer": 4}, "use 0..3"),
        ("triviaqa", {"answer": {"aliases": []}}, "aliases"),
    ],
)
def test_a_wrong_field(task, change, message):
    assert message in TASKS[task].check({**copy.deepcopy(_first(task)), **change})
