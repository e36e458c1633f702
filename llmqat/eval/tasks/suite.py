"""A model before the tasks: lm-eval's prompts and scoring, one result per task."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmqat.errors import ConfigError, DataError
from llmqat.eval.perplexity import evaluating
from llmqat.eval.tasks.catalog import ACC, ACC_ANSWER, ACC_NORM, TASKS, ZERO_SHOT, TaskSpec
from llmqat.eval.tasks.local import LocalRows, by_subject, read_rows

SEED = 1234
"""lm-eval's default for the choice of few-shot examples."""
WRITTEN = 256
"""Tokens that lm-eval lets a model write where a task does not say."""
_SPLITS = {"training_split": None, "validation_split": None, "test_split": "test"}

Entry = dict[str, Any]


@dataclass(frozen=True)
class _Loaded:
    """One task of the suite; `tasks` is what lm-eval evaluates."""

    name: str
    shots: int
    sha256: str | None
    tasks: Any


class TaskSuite:
    """The named tasks, loaded and checked before any model runs.

    Args:
        names: of `TASKS`.
        folder: of local files; None takes the Hugging Face cache, and never the network.
        shots: examples before each question; None is 0, and 5 for MMLU and TriviaQA.

    Raises:
        ConfigError: lm-eval is not installed. DataError: a data set is missing or malformed.
    """

    def __init__(
        self, names: Sequence[str], *, folder: Path | None = None, shots: int | None = None
    ) -> None:
        _require_lm_eval()
        with _quiet(), _offline():
            self._loaded = [
                _load(name, TASKS[name], folder, TASKS[name].shots if shots is None else shots)
                for name in names
            ]

    def check_context(self, context: int, tokenizer: Any) -> None:
        """ConfigError for a task whose answers would not fit behind its prompts, by its first one.

        Args:
            context: positions of the model.
            tokenizer: its tokenizer.
        """
        with _quiet():
            for loaded in self._loaded:
                for task in loaded.tasks["tasks"].values():
                    if task.OUTPUT_TYPE == "generate_until":
                        _check_room(loaded, task, context, tokenizer)

    def run(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        limit: int | None = None,
        batch_size: int = 1,
        done: Mapping[str, Entry] | None = None,
        keep: Callable[[dict[str, Entry]], None] | None = None,
    ) -> dict[str, Entry]:
        """Every task's metrics, in the suite's order.

        Args:
            model: a transformers ``*ForCausalLM``, plain, prepared or converted.
            tokenizer: its tokenizer.
            limit: at most so many questions per task (per subject for MMLU).
            batch_size: prompts per forward pass; changes speed only, see `ConfigError`.
            done: results of an earlier run, taken over where shots and data are the same.
            keep: called with all results so far whenever a task is finished.

        Returns:
            By task: its metrics with their standard errors, `metric` (the reported one), `shots`,
            `questions` and `seconds`.

        Raises:
            ConfigError: a task that does not fit into the model's context.
        """
        from lm_eval.models.huggingface import HFLM

        results: dict[str, Entry] = {}
        with _quiet(), evaluating(model), redirect_stdout(sys.stderr):
            # fp32, or a bfloat16 model's likelihoods would have three digits.
            lm = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype=torch.float32,
            )
            self.check_context(lm.max_length, tokenizer)
            for task in self._loaded:
                old = (done or {}).get(task.name)
                if old and (old["shots"], old["data_sha256"]) == (task.shots, task.sha256):
                    results[task.name] = old
                    continue
                print(f"{task.name}, {task.shots} shots", file=sys.stderr)
                started = time.perf_counter()
                entry = _evaluate(lm, task, limit)
                entry["seconds"] = round(time.perf_counter() - started, 3)
                results[task.name] = entry
                if keep is not None:
                    keep(results)
        return results


def averages(results: Mapping[str, Entry]) -> dict[str, Any]:
    """Means over the zero-shot tasks in `results`: `average` of each task's own metric (the LLaMA
    paper's protocol), `average_acc` of plain accuracy, and over how many, `average_of`.
    """
    chosen = [results[name] for name in ZERO_SHOT if name in results]
    if not chosen:
        return {"average": None, "average_acc": None, "average_of": 0}
    return {
        "average": sum(entry[entry["metric"]] for entry in chosen) / len(chosen),
        "average_acc": sum(entry[ACC] for entry in chosen) / len(chosen),
        "average_of": len(chosen),
    }


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--tasks: lm-eval cannot be imported ({error}); pip install 'llmqat[eval]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's advice on command lines that are not ours, and a bar per table of rows."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """No request leaves while data sets are looked up: the libraries read their environment
    variables on import, hence the constants.
    """
    import datasets
    import huggingface_hub

    places = [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _load(name: str, spec: TaskSpec, folder: Path | None, shots: int) -> _Loaded:
    rows = None if folder is None else read_rows(folder, name, spec, shots)
    members: dict[str, LocalRows | None]
    if name != "mmlu":
        members = {name: rows}
    elif rows is None:
        members = dict.fromkeys(_subjects(spec))
    else:
        subjects = by_subject(rows, shots)
        unknown = sorted(set(subjects) - {each.removeprefix("mmlu_") for each in _subjects(spec)})
        if unknown:
            raise DataError(f"mmlu.jsonl: {unknown[0]!r} is not a subject of MMLU")
        members = {f"mmlu_{subject}": part for subject, part in subjects.items()}
    group = {
        "group": f"llmqat_{name}",
        "task": [{"task": each, **_overrides(spec, part)} for each, part in members.items()],
    }
    try:
        tasks = _manager(spec).load([group])
    except (OSError, ValueError, KeyError) as error:
        if rows is not None:
            raise DataError(f"{name}: lm-eval cannot read its rows: {error}") from error
        raise DataError(
            f"{name}: its data set is not in the Hugging Face cache"
            f" ({' '.join(str(error).split())[:160]}); load it there once with the datasets"
            f" library, or put {name}.jsonl into a folder and name it with --tasks-dir"
        ) from error
    for task in tasks["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(SEED)
    return _Loaded(name, shots, None if rows is None else rows.sha256, tasks)


def _manager(spec: TaskSpec) -> Any:
    """Only the task's own folder: an index of all of lm-eval's takes ten seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=str(root / spec.folder), include_defaults=False)


def _subjects(spec: TaskSpec) -> list[str]:
    return [name for name in _manager(spec).all_subtasks if name.startswith("mmlu_")]


def _overrides(spec: TaskSpec, rows: LocalRows | None) -> dict[str, Any]:
    """What differs from lm-eval's own configuration of a task."""
    from llmqat.eval.tasks.scoring import AnswerNormalizedTask

    fields: dict[str, Any] = {}
    if spec.metric == ACC_ANSWER:
        fields["class"] = AnswerNormalizedTask
    if spec.normed:
        fields["metric_list"] = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (ACC, ACC_NORM)
        ]
    if rows is not None:
        fields |= {**_SPLITS, "fewshot_split": "examples" if rows.examples else None}
        fields["custom_dataset"] = _dataset(rows)
    return fields


def _dataset(rows: LocalRows) -> Callable[..., Any]:
    """A function that gives the rows as lm-eval's data set, whatever it is called with."""

    def splits(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        parts = {"test": Dataset.from_list(rows.questions)}
        if rows.examples:
            parts["examples"] = Dataset.from_list(rows.examples)
        return DatasetDict(parts)

    return splits


def _check_room(loaded: _Loaded, task: Any, context: int, tokenizer: Any) -> None:
    """lm-eval would cut examples off a prompt that is too long, or stop at an assertion."""
    written = task.config.generation_kwargs.get("max_gen_toks", WRITTEN)
    first = next((doc for _, doc in task.doc_iterator(limit=1)), None)
    if first is None:
        return  # lm-eval says so
    prompt = len(tokenizer(task.fewshot_context(first, loaded.shots), verbose=False)["input_ids"])
    task.set_fewshot_seed(SEED)  # the examples that were drawn here are drawn again
    if prompt + written > context:
        less = ", or give fewer --shots" if loaded.shots and written < context else ""
        raise ConfigError(
            f"--tasks: {loaded.name} needs {prompt + written} tokens, {written} of them to write,"
            f" and the model's context has {context}; leave it out{less}"
        )


def _evaluate(lm: Any, task: _Loaded, limit: int | None) -> Entry:
    from lm_eval.evaluator import evaluate

    found = evaluate(lm, task.tasks, limit=limit, log_samples=False, bootstrap_iters=1)
    parts = {name: _metrics(each) for name, each in found["results"].items()}
    counts = {name: each["effective"] for name, each in found["n-samples"].items()}
    total = sum(counts.values())
    entry: Entry = {"metric": TASKS[task.name].metric, "shots": task.shots, "questions": total}
    if task.name == "mmlu":
        # By questions, not by subjects: MMLU's usual average, and its error as of one sample.
        acc = sum(parts[name][ACC] * count for name, count in counts.items()) / total
        error = math.sqrt(acc * (1 - acc) / (total - 1)) if total > 1 else None
        subjects = {name.removeprefix("mmlu_"): parts[name][ACC] for name in counts}
        entry |= {ACC: acc, "acc_stderr": error, "subjects": subjects}
    else:
        entry |= parts[task.name]
    return {**entry, "data_sha256": task.sha256}


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's "metric,filter" keys without the filter; numbers only."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
