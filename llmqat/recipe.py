"""Options that a file or ``--set`` gives: each value has the type its command-line option has."""

from __future__ import annotations

from argparse import Action as Option
from argparse import ArgumentTypeError
from collections.abc import Iterable
from typing import Any

from llmqat.errors import ConfigError

KINDS: dict[object, str] = {str: "text", int: "a whole number", float: "a number"}
OWN = ("help", "config")
"""Options of every command that are no setting of it."""


def settings(options: Iterable[Option]) -> dict[str, Option]:
    """The options that a recipe may set, by name; of ``--graphs`` and ``--no-graphs`` the first."""
    found: dict[str, Option] = {}
    for option in options:
        if option.dest not in OWN:
            found.setdefault(option.dest, option)
    return found


def read_recipe(path: str) -> dict[str, object]:
    """The keys and values of a YAML file, keys with underscores.

    Raises:
        ConfigError: not text, not YAML, no mapping, or a key that stands there twice.
    """
    import yaml

    with open(path, "rb") as file:
        raw = file.read()
    try:
        loader = yaml.SafeLoader(raw.decode("utf-8"))
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no date such as 2-30
        raise ConfigError(f"--config {path}: not valid YAML{_place(error, raw)}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"--config {path}: expected a mapping of options, got {type(data).__name__}"
        )
    keys: set[str] = set()
    for key, _ in node.value if node is not None else ():
        name = str(key.value).replace("-", "_")
        if name in keys:
            raise ConfigError(
                f"--config {path}: {name}: stands there twice (line {key.start_mark.line + 1});"
                " leave one out"
            )
        keys.add(name)
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def _place(error: Exception, raw: bytes) -> str:
    """`` (line N)``, where the error says where it is."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return f" (line {mark.line + 1})"
    if isinstance(error, UnicodeDecodeError):
        line = raw.count(b"\n", 0, error.start) + 1
        return f" (line {line}: not UTF-8)"
    return ""


def convert(option: Option, value: object, *, words: bool = False) -> Any:
    """A YAML value as the option's command-line words would have given it.

    Args:
        words: the value was a word, so a number serves where text is wanted.

    Raises:
        ConfigError: it is of another type; the message does not name the option.
    """
    if value is None and option.default is None and not option.required:
        return None
    if option.nargs != "+":
        return _one(option, value, words)
    several = value if isinstance(value, list) else [value]
    if not several:
        raise ConfigError("expected at least one value, got an empty list")
    return [_one(option, each, words) for each in several]


def _one(option: Option, value: object, words: bool) -> Any:
    kind: Any = option.type
    if isinstance(value, bool) and kind not in KINDS:
        return value
    numbers = {str: (int, float) if words else (), int: (int,), float: (int, float)}.get(kind, ())
    if isinstance(value, bool) or not isinstance(value, (str, *numbers)):
        raise _unfit(kind, value, words)
    if kind is str:
        return value
    try:
        return kind(value)
    except (ValueError, OverflowError, ArgumentTypeError) as error:
        raise _unfit(kind, value, words) from error


def _unfit(kind: object, value: object, words: bool) -> ConfigError:
    got = "null" if value is None else type(value).__name__
    got = repr(value[:40]) if isinstance(value, str) else got
    quote = kind is str and not words and value is not None and not isinstance(value, (list, dict))
    return ConfigError(
        f"expected {KINDS.get(kind, 'true or false')}, got {got}"
        + ("; put it in quotes" if quote else "")
    )
