"""What a killed run has finished: one file per block, so that the next run goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmqat import io
from llmqat.errors import ConfigError

__all__ = ["BlockJournal"]

_RUN, _LOCK = "run.json", ".lock"


class BlockJournal:
    """Results of whole blocks in a folder of their own; one process at a time.

    Use as a context manager: it locks the folder. `remove()` when the result is written elsewhere.

    Args:
        folder: made if need be.
        identity: JSON values that decide the result; a run with others does not resume.
        resume: keep finished blocks. False starts anew.

    Raises:
        ConfigError: `resume`, and the folder is of another run. LockError: the folder is in use.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.folder = Path(folder)
        self._identity = dict(identity)
        self._resume = resume
        self._lock: io.Lock | None = None

    def __enter__(self) -> BlockJournal:
        io.make_dir(self.folder)
        self._lock = io.Lock(self.folder / _LOCK)
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        self._lock.release()

    def _open(self) -> None:
        io.remove_temps(self.folder)
        record = self.folder / _RUN
        if record.is_file():
            if self._resume:
                self._check(record)
                return
            # Without its record no block counts, also if the removal below is interrupted.
            io.remove(record)
        for path in sorted(self.folder.glob("block-*.safetensors")):
            io.remove(path)
        io.write_json(record, self._identity)

    def _check(self, record: Path) -> None:
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"resume: {record} is not JSON; run again without --resume"
            ) from error
        if not isinstance(found, dict):
            raise ConfigError(f"resume: {record} is not an object; run again without --resume")
        wanted = json.loads(json.dumps(self._identity))
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ConfigError(
                    f"resume: {self.folder} is of a run with another {name}; repeat that run, or"
                    " leave --resume out to start anew"
                )

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def load(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a finished block; None if it is not finished.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"resume: {path} is damaged; run again without --resume") from error

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Record a finished block."""
        with io.atomic_path(self._path(index)) as path:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)

    def remove(self) -> None:
        """Delete the folder: its results are written where they belong."""
        shutil.rmtree(self.folder)
        io.fsync_dir(self.folder.parent)
