"""The tasks of the paper: where lm-eval keeps them, what a row holds, which number is reported.

Prompts are lm-eval's own. The number that goes into the average is the LLaMA paper's, whose
protocol LLM-QAT's full-precision row follows: the choice with the highest likelihood per character
(`acc_norm`), and for BoolQ and OpenBookQA the highest likelihood divided by that of the same choice
after "Answer:" alone (`acc_answer`). WinoGrande compares one ending after two contexts, where a
length in characters divides nothing: `acc`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmqat.errors import ConfigError

Row = dict[str, Any]
Check = Callable[[Row], str | None]
ACC, ACC_NORM, ACC_ANSWER, EXACT_MATCH = "acc", "acc_norm", "acc_answer", "exact_match"


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        folder: where its YAML lies under ``lm_eval/tasks``.
        metric: the number that is reported, and averaged for the eight.
        check: what is wrong with a row, or None.
        shots: examples before each question unless the user says otherwise.
        normed: whether accuracy per character has a meaning.
    """

    folder: str
    metric: str
    check: Check
    shots: int = 0
    normed: bool = True


def _fields(row: Row, **kinds: type | tuple[type, ...]) -> str | None:
    for name, kind in kinds.items():
        if name not in row:
            return f"no field {name!r}"
        value = row[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"{name} is {value!r}, of the wrong type"
    return None


def _strings(value: object, low: int, *, empty: bool = False) -> bool:
    """Whether it is a list of at least `low` strings, none of them empty unless allowed."""
    return (
        isinstance(value, list)
        and len(value) >= low
        and all(isinstance(each, str) and (each or empty) for each in value)
    )


def _index(row: Row, name: str, first: int, count: int) -> str | None:
    """`name` must hold a number from `first` on, as an integer or its digits."""
    value = row.get(name)
    accepted = range(first, first + count)
    plain = isinstance(value, int) and not isinstance(value, bool)
    if (plain or isinstance(value, str)) and str(value).strip() in map(str, accepted):
        return None
    return f"{name} is {value!r}; use {accepted[0]}..{accepted[-1]}"


def _boolq(row: Row) -> str | None:
    kinds = _fields(row, passage=str, question=str, label=int)
    return kinds or _index(row, "label", 0, 2)


def _piqa(row: Row) -> str | None:
    kinds = _fields(row, goal=str, sol1=str, sol2=str, label=int)
    return kinds or _index(row, "label", 0, 2)


def _social_iqa(row: Row) -> str | None:
    kinds = _fields(row, context=str, question=str, answerA=str, answerB=str, answerC=str)
    return kinds or _index(row, "label", 1, 3)


def _hellaswag(row: Row) -> str | None:
    wrong = _fields(row, activity_label=str, ctx_a=str, ctx_b=str, endings=list)
    if wrong is None and not _strings(row["endings"], 2):
        wrong = "endings must be a list of at least two texts"
    return wrong or _index(row, "label", 0, len(row["endings"]))


def _winogrande(row: Row) -> str | None:
    wrong = _fields(row, sentence=str, option1=str, option2=str, answer=str)
    if wrong is None and "_" not in row["sentence"]:
        wrong = "sentence must have a '_'"
    return wrong or _index(row, "answer", 1, 2)


def _lettered(stem: str) -> Check:
    def check(row: Row) -> str | None:
        wrong = _fields(row, **{stem: str}, choices=dict, answerKey=str)
        if wrong is not None:
            return wrong
        text, label = row["choices"].get("text"), row["choices"].get("label")
        if not _strings(text, 2) or not _strings(label, 2) or len(text) != len(label):
            return "choices must hold as many 'text' as 'label', at least two"
        if row["answerKey"].strip() not in label:
            return f"answerKey is {row['answerKey']!r}, not one of {', '.join(label)}"
        return None

    return check


def _mmlu(row: Row) -> str | None:
    wrong = _fields(row, question=str, choices=list, answer=int, subject=str)
    if wrong is None and (not _strings(row["choices"], 4, empty=True) or len(row["choices"]) != 4):
        wrong = "choices must be a list of four texts"
    return wrong or _index(row, "answer", 0, 4)


def _triviaqa(row: Row) -> str | None:
    wrong = _fields(row, question=str, answer=dict)
    if wrong is None and not _strings(row["answer"].get("aliases"), 1, empty=True):
        wrong = "answer must hold 'aliases', a list of at least one text"
    return wrong


TASKS = {
    "boolq": TaskSpec("super_glue/boolq", ACC_ANSWER, _boolq),
    "piqa": TaskSpec("piqa", ACC_NORM, _piqa),
    "social_iqa": TaskSpec("siqa", ACC_NORM, _social_iqa),
    "hellaswag": TaskSpec("hellaswag", ACC_NORM, _hellaswag),
    "winogrande": TaskSpec("winogrande", ACC, _winogrande, normed=False),
    "arc_easy": TaskSpec("arc", ACC_NORM, _lettered("question")),
    "arc_challenge": TaskSpec("arc", ACC_NORM, _lettered("question")),
    "openbookqa": TaskSpec("openbookqa", ACC_ANSWER, _lettered("question_stem")),
    "mmlu": TaskSpec("mmlu/default", ACC, _mmlu, shots=5, normed=False),
    "triviaqa": TaskSpec("triviaqa", EXACT_MATCH, _triviaqa, shots=5, normed=False),
}
ZERO_SHOT = tuple(list(TASKS)[:8])
"""The eight of tables 1 and 3 to 8, in the paper's order."""
GROUPS = {"zero-shot": ZERO_SHOT, "all": tuple(TASKS)}


def task_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The tasks behind names, commas and groups, each once, in the order asked.

    Raises:
        ConfigError: nothing asked, or a name that is neither task nor group.
    """
    names: dict[str, None] = {}
    for word in (part.strip() for each in asked for part in each.split(",")):
        if word in GROUPS:
            names.update(dict.fromkeys(GROUPS[word]))
        elif word in TASKS:
            names[word] = None
        else:
            accepted = ", ".join((*GROUPS, *TASKS))
            raise ConfigError(f"--tasks: {word!r} is not supported; use {accepted}")
    if not names:
        raise ConfigError("--tasks: names no task")
    return tuple(names)
