"""Budgets: how much data, how many steps and which metrics; ``budgets.yaml`` as frozen records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from llmqat.errors import ConfigError
from llmqat.experiments.options import command_options
from llmqat.recipe import convert

SECTIONS = {
    "generate": "generate-data",
    "calibrate": "quantize",
    "smoothquant": "quantize",
    "gptq": "quantize",
    "awq": "quantize",
    "zeroquant": "quantize",
    "train": "train",
    "evaluate": "eval",
    "tasks": "eval",
}
"""The sections of a budget, and the command whose options each holds."""
FIXED = ("model", "data", "output", "teacher", "text", "calibration", "resume", "json")
"""Options that the experiment itself gives: they say what a cell is, or where things lie."""
METRICS = ("perplexity", "tasks")


@dataclass(frozen=True)
class Budget:
    """One budget.

    Attributes:
        metrics: kinds of columns that are measured, of :data:`METRICS`.
        sections: section, option, value; options of the commands, with underscores.
        in_process: run stages in this process (start-up would dominate), not one each.
    """

    name: str
    description: str
    metrics: tuple[str, ...]
    sections: Mapping[str, Mapping[str, Any]]
    in_process: bool = False

    def options(self, *names: str, **extra: Any) -> dict[str, Any]:
        """The options of one or several sections, later ones winning, without nulls."""
        merged: dict[str, Any] = {}
        for name in names:
            merged |= self.sections.get(name, {})
        merged |= extra
        return {k: v for k, v in merged.items() if v is not None and v is not False}

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> Budget:
        """This budget with other options in some sections.

        Raises:
            ConfigError: no such section.
        """
        for section in changes:
            if section not in SECTIONS:
                raise ConfigError(
                    f"{section}: is not a section of a budget; use {', '.join(SECTIONS)}"
                )
        names = {*self.sections, *changes}
        return replace(
            self,
            sections={n: {**self.sections.get(n, {}), **changes.get(n, {})} for n in names},
        )


@cache
def load_budgets() -> dict[str, Budget]:
    """The budgets by name.

    Raises:
        ConfigError: the file is wrong.
    """
    path = files("llmqat.experiments") / "budgets.yaml"
    return {
        name: parse_budget(name, values)
        for name, values in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def parse_budget(name: str, values: Mapping[str, Any]) -> Budget:
    """A budget from its part of the file.

    Raises:
        ConfigError: an unknown key, or a metric that is none.
    """
    known = ("description", "metrics", "in_process", *SECTIONS)
    for key in values:
        if key not in known:
            raise ConfigError(f"budget {name}: unknown key {key!r}; use {', '.join(known)}")
    metrics = tuple(values.get("metrics", ()))
    if not metrics or any(metric not in METRICS for metric in metrics):
        raise ConfigError(f"budget {name}: metrics must be some of {', '.join(METRICS)}")
    return Budget(
        name=name,
        description=values.get("description", ""),
        metrics=metrics,
        sections={key: dict(values[key]) for key in SECTIONS if key in values},
        in_process=bool(values.get("in_process", False)),
    )


def find_budget(name: str) -> Budget:
    """The budget of that name.

    Raises:
        ConfigError: there is none.
    """
    budgets = load_budgets()
    if name not in budgets:
        raise ConfigError(f"--budget: {name!r} is not a budget; use {', '.join(budgets)}")
    return budgets[name]


def parse_overrides(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["train.steps=256", "train.lr=1e-4"]`` as sections; values are YAML.

    Raises:
        ConfigError: a word of another form, an option that the section's command has not or the
            experiment gives itself, or a value of another type.
    """
    changes: dict[str, dict[str, Any]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        section, dot, option = name.partition(".")
        if not (equals and dot and section and option):
            raise ConfigError(f"--set: {word!r} is not of the form train.steps=256")
        option = option.replace("-", "_")
        changes.setdefault(section, {})[option] = _checked(section, option, _scalar(word, value))
    return changes


def _checked(section: str, name: str, value: Any) -> Any:
    """A value for an option of a section; null leaves the option out."""
    if section not in SECTIONS:
        raise ConfigError(
            f"--set: {section} is not a section of a budget; use {', '.join(SECTIONS)}"
        )
    options = command_options(SECTIONS[section])
    if name in FIXED and name in options:
        raise ConfigError(f"--set: {section}.{name} is given by the experiment itself; leave it")
    if name not in options:
        near = get_close_matches(name, options.keys() - set(FIXED), 1)
        hint = f"did you mean {section}.{near[0]}?" if near else "see its --help"
        raise ConfigError(
            f"--set: {section}.{name} is not an option of llmqat {SECTIONS[section]}; {hint}"
        )
    try:
        return None if value is None else convert(options[name], value, words=True)
    except ConfigError as error:
        raise ConfigError(f"--set: {section}.{name}: {error}") from error


def _scalar(word: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set: {word!r}: the value is not valid YAML") from error
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a word
        try:
            return float(value)
        except ValueError:
            return value
    return value
