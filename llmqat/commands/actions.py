"""Commands of two words, ``llmqat COMMAND ACTION [WORDS] [options]``.

A module of ``llmqat.commands`` that has ``ACTIONS`` instead of ``ARGUMENTS`` and ``run`` is such a
command: each action has its own options and its own function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class UsageError(ValueError):
    """The words of a command are wrong; the status is 2, as for an option that there is not."""


@dataclass(frozen=True)
class Action:
    """One action.

    Attributes:
        help: one line.
        arguments: dataclasses of its options.
        run: called with the words, then with one instance per dataclass.
        words: names of the words that must follow the action, such as ``("NAME",)``.
    """

    help: str
    arguments: tuple[type, ...]
    run: Callable[..., int | None]
    words: tuple[str, ...] = ()


def usage(command: str, actions: dict[str, Action]) -> str:
    """What ``llmqat COMMAND --help`` prints."""
    shown = {" ".join((name, *action.words)): action.help for name, action in actions.items()}
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {text}" for name, text in shown.items()]
    return (
        f"usage: llmqat {command} ACTION [options]\n\n"
        + "\n".join(lines)
        + f"\n\nllmqat {command} ACTION --help shows its options; --config FILE.yaml sets their"
        + " defaults."
    )


def split_words(argv: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """The words before the first option (at most ``count``), and the rest."""
    end = 0
    while end < min(count, len(argv)) and not argv[end].startswith("-"):
        end += 1
    return list(argv[:end]), list(argv[end:])


def run_action(
    command: str,
    actions: dict[str, Action],
    argv: Sequence[str],
    parse: Callable[[str, tuple[type, ...], Sequence[str]], tuple[Any, ...]],
) -> int | None:
    """Run the action that ``argv`` names; returns its exit status.

    Args:
        parse: called with "COMMAND ACTION", the dataclasses and the options.

    Raises:
        UsageError: no such action, or a missing word. SystemExit: after printing the help.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(command, actions))
        raise SystemExit(0 if argv else 2)  # as argparse does
    name, rest = argv[0], list(argv[1:])
    if name not in actions:
        raise UsageError(f"unknown action {name!r}; use {' or '.join(actions)}")
    action = actions[name]
    words, options = split_words(rest, len(action.words))
    if len(words) < len(action.words) and not {"-h", "--help"} & set(options):
        missing = action.words[len(words)]
        raise UsageError(f"{missing}: not given; write llmqat {command} {name} {missing} [options]")
    instances = parse(f"{command} {name}", action.arguments, options)
    return action.run(*words, *instances)
