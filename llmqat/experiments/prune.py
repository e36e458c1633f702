"""Freeing the space of models that experiments made: their numbers are kept, and a model is made
again when something must read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmqat import io
from llmqat.errors import ConfigError, DataError, LockError
from llmqat.experiments.stages import LOCK, OUTPUT, RESULT

MODELS = frozenset({"train", "quantize"})
"""Commands whose output is a model. Generated text and teacher logits are what costs time."""


@dataclass(frozen=True)
class Model:
    """The output folder of a finished stage, and its bytes."""

    folder: Path
    nbytes: int


def find_models(root: Path) -> Iterator[Model]:
    """Models of finished stages below ``root``/stages.

    Raises:
        DataError: a damaged stage.
    """
    for result in sorted((root / "stages").glob(f"*/{RESULT}")):
        output = result.parent / OUTPUT
        if output.is_dir() and _command(result) in MODELS:
            files = [path for path in output.rglob("*") if path.is_file()]
            yield Model(output, sum(path.stat().st_size for path in files))


def _command(result: Path) -> str:
    try:
        words = json.loads(result.read_text(encoding="utf-8"))["command"].split()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{result} is damaged; delete its folder and run again") from error
    return next((word for word in words if word in MODELS), "")


def prune(root: Path) -> list[Model]:
    """Delete them; half-done stages keep what they have.

    Raises:
        ConfigError: a run works there, which may read any model. DataError: a damaged stage.
        Nothing is deleted then.
    """
    _check_idle(root)
    models = list(find_models(root))
    for model in models:
        shutil.rmtree(model.folder)
    return models


def _check_idle(root: Path) -> None:
    for lock in (root / "stages").glob(f"*/{LOCK}"):
        try:
            with io.Lock(lock):
                pass
        except LockError as error:
            raise ConfigError(
                f"--output: a run works on {lock.parent.name}; prune {root} after it"
            ) from error
