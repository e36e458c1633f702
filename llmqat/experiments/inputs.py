"""What experiments read: a model, evaluation texts, training texts; each with the digest of its
bytes.

A digest costs a pass over the file, so it is remembered in the output folder with the file's size
and time of change. The alias ``smollm2-135m`` and the stand-in texts are made from installed
packages (``llmqat.demo.assets``, :mod:`llmqat.experiments.texts`); nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmqat import io
from llmqat.errors import CheckpointError, ConfigError, DataError
from llmqat.experiments.stages import Source
from llmqat.experiments.texts import DEFAULT_TEXTS, EVALUATION_STAND_INS, TRAINING_STAND_INS

ALIASES = ("smollm2-135m",)
STAND_IN = "stand-in"
"""Instead of a file: the text out of a package."""
_MODEL_FILES = ("*.json", "*.model", "*.safetensors")


@dataclass(frozen=True)
class Inputs:
    """Everything that is read from outside.

    Attributes:
        name: of the model, for the report.
        model: the full-precision model.
        generator: the model that writes the training data (the paper's is always LLaMA-7B).
        texts: evaluation texts by name.
        train_texts: training texts by name.
        missing: why a training text is not there, by name.
        stand_ins: what a text really is, by "text NAME" or "train text NAME".
        tasks_dir: local task files; None is the evaluation's own choice.
        device: of every command.
        threads: of every command; None is torch's choice.
        launch: words before training commands.
    """

    name: str
    model: Source
    generator: Source
    texts: Mapping[str, Source]
    train_texts: Mapping[str, Source] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    tasks_dir: Source | None = None
    device: str = "cpu"
    threads: int | None = None
    launch: tuple[str, ...] = ()


class Digests:
    """SHA-256 of files, remembered by path, size and time of change in ``folder/digests.json``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "digests.json"
        try:
            self._known: dict[str, str] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._known = {}
        except ValueError as error:
            raise DataError(f"{self._path} is damaged; delete it") from error

    def file(self, path: Path) -> str:
        """The digest of one file."""
        state = path.stat()
        key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = io.sha256_file(path)
            io.make_dir(self._path.parent)
            io.write_json(self._path, self._known)
        return self._known[key]

    def files(self, paths: Iterable[Path], root: Path) -> str:
        """One digest of several files and their names below ``root``."""
        total = hashlib.sha256()
        for path in sorted(paths):
            total.update(f"{path.relative_to(root)} {self.file(path)}\n".encode())
        return total.hexdigest()

    def model(self, folder: Path) -> Source:
        """A model folder, by its weights, configuration and tokenizer.

        Raises:
            CheckpointError: it is none.
        """
        if not (folder / "config.json").is_file():
            names = ", ".join(ALIASES)
            raise CheckpointError(
                f"--model: {folder} has no config.json; name a transformers folder or {names}"
            )
        paths = [path for pattern in _MODEL_FILES for path in folder.glob(pattern)]
        return Source(folder, self.files(paths, folder))

    def source(self, option: str, path: Path) -> Source:
        """A file, or a folder with all its files.

        Raises:
            DataError: there is nothing.
        """
        if path.is_file():
            return Source(path, self.file(path))
        if not path.is_dir():
            raise DataError(f"{option}: {path} does not exist")
        return Source(path, self.files((p for p in path.rglob("*") if p.is_file()), path))


def parse_named(option: str, words: Sequence[str], accepted: Sequence[str]) -> dict[str, Path]:
    """``["c4=FILE"]`` as name and path.

    Raises:
        ConfigError: another form, or a name that no table uses.
    """
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path or name not in accepted:
            raise ConfigError(
                f"{option}: {word!r} is not NAME=FILE with a name of {', '.join(accepted)}"
            )
        found[name] = Path(path)
    return found


def find_model(name: str, cache: Path) -> Path:
    """The folder of a model: itself, or what an alias stands for.

    Raises:
        CheckpointError: the alias's package is missing.
    """
    if name == "smollm2-135m" and not Path(name).exists():
        from llmqat.demo.assets import smollm2

        return smollm2(cache)
    return Path(name)


def gather(
    model: str,
    *,
    folder: Path,
    cache: Path,
    generator: str | None = None,
    texts: Mapping[str, Path] | None = None,
    train_texts: Mapping[str, Path] | None = None,
    needed_texts: Sequence[str] = (),
    needed_train_texts: Iterable[str] = (),
    tasks_dir: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    launch: tuple[str, ...] = (),
) -> Inputs:
    """Find, make and identify all inputs.

    Args:
        folder: the output folder, where digests are remembered.
        cache: where models and texts out of packages are kept.
        needed_texts, needed_train_texts: names that the tables use; stand-ins serve where none is
            given and one exists.

    Raises:
        CheckpointError, DataError: a model or an evaluation text is missing or unreadable.
    """
    digests = Digests(folder)
    path = find_model(model, cache)
    source = digests.model(path)
    asked = dict(texts or {})
    for name in DEFAULT_TEXTS:
        if name in needed_texts:
            asked.setdefault(name, Path(STAND_IN))
    given: dict[str, Source] = {}
    trained = {name: digests.source("--train-text", f) for name, f in (train_texts or {}).items()}
    stand_ins: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name, file in asked.items():
        if file == Path(STAND_IN):
            stand_in = EVALUATION_STAND_INS[name]
            file = stand_in.make(cache)
            stand_ins[f"text {name}"] = stand_in.description
        given[name] = digests.source("--text", file)
    for name in needed_train_texts:
        if name in trained:
            continue
        stand_in = TRAINING_STAND_INS[name]
        try:
            trained[name] = digests.source("--train-text", stand_in.make(cache))
            stand_ins[f"train text {name}"] = stand_in.description
        except DataError as error:
            missing[name] = f"--train-text {name}=FILE is not given, and {error}"
    return Inputs(
        name=model if model in ALIASES else path.resolve().name,
        model=source,
        generator=source if generator is None else digests.model(find_model(generator, cache)),
        texts=given,
        train_texts=trained,
        missing=missing,
        stand_ins=stand_ins,
        tasks_dir=None if tasks_dir is None else digests.source("--tasks-dir", tasks_dir),
        device=device,
        threads=threads,
        launch=launch,
    )
