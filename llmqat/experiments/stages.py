"""Stages: ``llmqat`` commands whose place on the disk is the hash of what decides their result.

A stage is one command with its options. An option's value may be another stage (its output folder
is read) or a :class:`Source` (a file or folder that the user has). The hash covers the command, the
options and, through the hashes of the stages and sources, all that is read; it does not cover where
things lie nor options that change the speed alone. Equal hashes are therefore the same work, which
is done once: cells and tables share stages.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmqat.errors import DataError

SPEED_ONLY = frozenset(
    "slots threads save_steps save_limit log_steps health_steps records_per_part".split()
)
"""Options that never change a number."""
SPEED_ONLY_OF = {"eval": frozenset({"batch_size"})}
JSON_COMMANDS = frozenset({"generate-data", "quantize", "eval", "teacher-logits"})
"""Commands that print their result as one JSON object."""
OUTPUT = "output"
RESULT, COMMAND, LOG, LOCK = "result.json", "command.json", "log.txt", ".lock"


@dataclass(frozen=True)
class Source:
    """A file or folder that is read but not made here; ``digest`` identifies its bytes."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: for people; part of the folder's name.
        command: a subcommand of ``llmqat``.
        options: name (with underscores) and value; True is a flag, a tuple several words.
        writes: whether it gets ``--output``.
        resumes: whether it gets ``--resume``.
        launch: words before the command, such as ``accelerate launch ...``.
    """

    name: str
    command: str
    options: tuple[tuple[str, Any], ...]
    writes: bool = True
    resumes: bool = False
    launch: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits."""
        ignored = SPEED_ONLY | SPEED_ONLY_OF.get(self.command, frozenset())
        identity: dict[str, Any] = {
            "command": self.command,
            "options": {k: _identity(v) for k, v in self.options if k not in ignored},
        }
        if self.launch:  # it decides the number of processes, hence the global batch
            identity["launch"] = list(self.launch)
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.hash}-{self.name}"

    @property
    def kind(self) -> str:
        """What stages of similar length share, for estimates: command and method."""
        method = dict(self.options).get("method", "")
        return f"{self.command} {method}"

    @property
    def needs(self) -> tuple[Stage, ...]:
        """The stages whose output it reads."""
        return tuple(part for _, value in self.options for part in _parts(value) if _is_stage(part))


def _is_stage(value: object) -> bool:
    return isinstance(value, Stage)


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _identity(value: Any) -> Any:
    if isinstance(value, Stage):
        return f"stage:{value.hash}"
    if isinstance(value, Source):
        return f"source:{value.digest}"
    if isinstance(value, tuple):
        return [_identity(part) for part in value]
    return value


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all they need, each once, what is read before what reads it."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.hash not in found:
            for needed in stage.needs:
                visit(needed)
            found[stage.hash] = stage

    for stage in stages:
        visit(stage)
    return list(found.values())


class Store:
    """The folder of all stages."""

    def __init__(self, root: Path) -> None:
        self.root = root / "stages"

    def path(self, stage: Stage) -> Path:
        """The stage's own folder."""
        return self.root / stage.folder

    def output(self, stage: Stage) -> Path:
        """What the stage's command gets as ``--output``."""
        return self.path(stage) / OUTPUT

    def is_done(self, stage: Stage) -> bool:
        """Whether its result is written, and readable."""
        return self._read(stage) is not None

    def is_damaged(self, stage: Stage) -> bool:
        """Whether its result is written and cannot be read: it counts as not done."""
        return (self.path(stage) / RESULT).exists() and not self.is_done(stage)

    def damaged(self, stage: Stage) -> list[Stage]:
        """Which of it and all it needs are damaged: without their records a cell whose values are
        there could not say how they were made.
        """
        return [each for each in in_order([stage]) if self.is_damaged(each)]

    def is_begun(self, stage: Stage) -> bool:
        """Whether a run began it and did not end it."""
        folder = self.path(stage)
        return (folder / COMMAND).is_file() and not (folder / RESULT).exists()

    def record(self, stage: Stage) -> dict[str, Any]:
        """``{"command", "seconds", "result", ...}`` of a finished stage.

        Raises:
            DataError: it is not done, or damaged.
        """
        record = self._read(stage)
        if record is None:
            raise DataError(f"{self.path(stage) / RESULT} is missing or damaged; run again")
        return record

    def _read(self, stage: Stage) -> dict[str, Any] | None:
        try:
            text = (self.path(stage) / RESULT).read_text(encoding="utf-8")
            record = dict(json.loads(text))
            float(record["seconds"]), record["result"], record["command"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def argv(self, stage: Stage) -> list[str]:
        """The words after ``llmqat``."""
        words = [stage.command]
        for name, value in stage.options:
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.extend(self._word(part) for part in _parts(value))
        if stage.writes:
            words += ["--output", str(self.output(stage))]
        if stage.resumes:
            words.append("--resume")
        if stage.command in JSON_COMMANDS:
            words.append("--json")
        return words

    def shown(self, stage: Stage) -> str:
        """The command as a user would type it."""
        program = (*stage.launch, "-m", "llmqat.cli") if stage.launch else ("llmqat",)
        return shlex.join((*program, *self.argv(stage)))

    def _word(self, value: Any) -> str:
        if isinstance(value, Stage):
            return str(self.output(value))
        return str(value.path if isinstance(value, Source) else value)
