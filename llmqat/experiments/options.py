"""What the commands take: a budget's options and a stage's values are checked before any run."""

from __future__ import annotations

from argparse import Action as Option
from dataclasses import fields
from functools import cache
from importlib import import_module

from llmqat.errors import ConfigError
from llmqat.experiments.stages import Source, Stage
from llmqat.recipe import settings


def _arguments(command: str) -> tuple[type, ...]:
    return tuple(import_module(f"llmqat.commands.{command.replace('-', '_')}").ARGUMENTS)


@cache
def command_options(command: str) -> dict[str, Option]:
    """The options of a command by name."""
    from transformers import HfArgumentParser

    return settings(HfArgumentParser(list(_arguments(command)))._actions)


def check_values(stage: Stage) -> None:
    """Refuse now what the stage's command would refuse after hours of other stages.

    Raises:
        ConfigError: a value that the command's options do not allow.
    """
    options = command_options(stage.command)
    values = {name: _plain(value, options[name]) for name, value in stage.options}
    if stage.writes:
        values["output"] = "output"
    for kind in _arguments(stage.command):
        names = {field.name for field in fields(kind)}
        try:
            kind(**{name: value for name, value in values.items() if name in names})
        except ConfigError as error:
            raise ConfigError(f"llmqat {stage.command} ({stage.name}): {error}") from error


def _plain(value: object, option: Option) -> object:
    """A value as the command's parser would give it; every folder and file has some name."""
    if isinstance(value, tuple):
        return [_plain(part, option) for part in value]
    if isinstance(value, (Stage, Source)):
        return "folder"
    return str(value) if option.type is str else value
