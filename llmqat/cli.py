"""The ``llmqat`` command: one subcommand per stage of the river.

Each subcommand is a module of ``llmqat.commands`` with an ``Arguments`` dataclass (or several) and
``run(...)``, or with ``ACTIONS`` where a second word says what to do; it is imported only when it
is used, so ``llmqat --help`` answers at once. Every subcommand takes ``--config FILE.yaml``: the
file sets defaults, the command line wins.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from llmqat import __version__
from llmqat.commands.actions import UsageError, run_action
from llmqat.errors import ConfigError
from llmqat.recipe import convert, read_recipe, settings

COMMANDS = {
    "generate-data": "let the teacher write its own training text",
    "teacher-logits": "save the teacher's largest probabilities beside generated text",
    "train": "quantization-aware training with logits distillation",
    "eval": "perplexity and question sets of a full-precision, fake-quantized or packed model",
    "quantize": "a packed checkpoint by a post-training method: rtn, smoothquant, gptq, ...",
    "export": "write a packed int4/int8 checkpoint (compressed-tensors layout)",
    "generate": "generate text from a checkpoint with the quantized KV cache",
    "bench": "measure a model on this machine: kv (cache memory and decode speed)",
    "info": "which backend runs each operator here, and why",
    "demo": "the whole river on a small real model",
    "experiments": "the paper's tables and figures on any model: list, run, report",
}
RESUMED = ("generate-data", "teacher-logits", "train", "quantize", "demo", "experiments")
"""Commands whose work goes on where it was cut short."""
PLAIN_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)


def usage() -> str:
    """The overview printed by ``llmqat --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "usage: llmqat COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\nllmqat COMMAND --help shows its options; llmqat --version the version."
    )


def parse_arguments(command: str, types: Sequence[type], argv: Sequence[str]) -> tuple[object, ...]:
    """Parse ``argv`` into one instance of every dataclass of ``types``; ``--config FILE`` sets
    defaults.

    Raises:
        ConfigError: unreadable YAML, a key that no option has, or a value of another type.
        SystemExit: 2, with one line, for an argument that no option has, a value that is none of an
            option's, or a missing option.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        list(types),
        prog=f"llmqat {command}",
        description=COMMANDS[command.partition(" ")[0]],
        allow_abbrev=False,
    )
    _refuse_in_one_line(parser, command)
    for option in parser._actions:
        if isinstance(option, argparse._StoreFalseAction):  # --graphs says both
            option.help = argparse.SUPPRESS
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of options; the command line wins"
    )
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _refuse_in_one_line(finder, command)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is not None:
        _set_defaults(parser, path, command)
    *instances, _, unknown = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        options = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, 1)
        hint = f"did you mean {near[0]}?" if near else f"see llmqat {command} --help"
        parser.exit(2, f"llmqat {command}: unknown argument {unknown[0]!r}; {hint}\n")
    return tuple(instances)


def _refuse_in_one_line(parser: argparse.ArgumentParser, command: str) -> None:
    """Let a parser say what is wrong without its usage, which is a page long."""

    def error(message: str) -> NoReturn:
        parser.exit(2, f"llmqat {command}: {message}; see llmqat {command} --help\n")

    parser.error = error  # type: ignore[method-assign]


def _set_defaults(parser: argparse.ArgumentParser, path: str, command: str) -> None:
    """Take the defaults from a file; what it sets the command line need not give."""
    options, defaults = settings(parser._actions), read_recipe(path)
    for name, value in defaults.items():
        if name not in options:
            raise ConfigError(
                f"--config {path}: unknown option {name!r}; see llmqat {command} --help"
            )
        try:
            defaults[name] = convert(options[name], value)
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {name}: {error}") from error
    parser.set_defaults(**defaults)
    for name in defaults:
        options[name].required = False


def _import(command: str, own_process: bool) -> ModuleType:
    """The module of a command. In a process of its own no collection of garbage looks at what is
    imported, then, later or at the end: that took two of five seconds of `llmqat train --help`.
    """
    if own_process:
        gc.disable()
    try:
        return import_module(f"llmqat.commands.{command.replace('-', '_')}")
    finally:
        if own_process:
            gc.freeze()
            gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed with a one-line reason, 2 wrong
    usage.
    """
    own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"llmqat {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(
            f"llmqat: unknown command {command!r}; use one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    try:
        module = _import(command, own_process)
        if hasattr(module, "ACTIONS"):
            status = run_action(command, module.ACTIONS, rest, parse_arguments)
        else:
            status = module.run(*parse_arguments(command, module.ARGUMENTS, rest))
        return 0 if status is None else int(status)
    except KeyboardInterrupt:
        resume = "; what was written stays valid, the run can resume" if command in RESUMED else ""
        print(f"llmqat {command}: interrupted{resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmqat info | head`: nobody reads on, and Python need not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"llmqat {command}: {error}", file=sys.stderr)
        return 2
    except PLAIN_ERRORS as error:
        if os.environ.get("LLMQAT_TRACEBACK"):
            raise
        print(f"llmqat {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
