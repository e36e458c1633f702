"""Kills, torn writes, power cuts and full disks at a chosen step of a process's work on files."""

from __future__ import annotations

import os
import random
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "ftruncate")
REAL = {name: getattr(os, name) for name in STEPS}


@dataclass
class _Change:
    """A change of names that a power cut may undo: `put_back` restores what was, from `spare`
    copies.
    """

    folder: str
    put_back: Callable[[], None]


class Faults:
    """Replaces the `os` file functions while active, counts their steps, strikes at step `at`.

    kind "before": SIGKILL before the step. "torn": a write is done by half, any other step whole,
    then SIGKILL. "power": SIGKILL before the step, and an arbitrary part of what was not fsynced is
    lost: tails of files (cut off or zeroed), and the latest creations, renames and removals since
    each folder's last fsync. "enospc": a write is done by half and fails. None: nothing. `trace`
    lists (step, path); steps on descriptors show the path given to `open`. `spare` is a folder for
    the copies that "power" needs.
    """

    def __init__(self, kind: str | None = None, at: int = -1, spare: Path | None = None) -> None:
        self.kind, self.at, self.spare = kind, at, spare
        self.trace: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        self._files: list[list[int]] = []  # [own duplicate, synced size]
        self._changes: list[_Change] = []
        self._random = random.Random(at)

    def __enter__(self) -> Faults:
        for name in STEPS:
            setattr(os, name, getattr(self, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name in STEPS:
            setattr(os, name, REAL[name])
        for duplicate, _ in self._files:
            os.close(duplicate)

    def _strikes(self, name: str, path: Any) -> bool:
        """Count a step; True if the strike is due within it. A kill before it does not return."""
        self.trace.append((name, str(path)))
        if len(self.trace) - 1 != self.at:
            return False
        if self.kind == "power":
            self._cut_power()
        if self.kind in ("before", "power"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.kind in ("torn", "enospc")

    def _done(self, strike: bool) -> None:
        if strike and self.kind == "torn":
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        creates = bool(flags & os.O_CREAT) and not os.path.exists(path)
        strike = creates and self._strikes("open", path)
        fd = REAL["open"](path, flags, mode)
        self._paths[fd] = os.fspath(path)
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._files.append([os.dup(fd), os.fstat(fd).st_size])
        if creates:
            self._changed(path, lambda: REAL["unlink"](path))
        self._done(strike)
        return int(fd)

    def write(self, fd: int, data: Any) -> int:
        if self._strikes("write", self._paths[fd]):
            REAL["write"](fd, memoryview(data)[: len(data) // 2])
            self._done(True)
            raise OSError(28, "No space left on device")
        return int(REAL["write"](fd, data))

    def fsync(self, fd: int) -> None:
        # Not done for real: a killed process leaves the page cache whole, and power cuts are
        # modelled here.
        strike = self._strikes("fsync", self._paths[fd])
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            folder = self._paths[fd]
            self._changes = [change for change in self._changes if change.folder != folder]
        status = os.fstat(fd)
        for entry in self._files:
            if os.path.samestat(os.fstat(entry[0]), status):
                entry[1] = status.st_size
        self._done(strike)

    def ftruncate(self, fd: int, size: int) -> None:
        strike = self._strikes("ftruncate", self._paths[fd])
        REAL["ftruncate"](fd, size)
        self._done(strike)

    def replace(self, source: Any, target: Any) -> None:
        strike = self._strikes("replace", target)
        copy = self._copy(target)
        REAL["replace"](source, target)

        def put_back() -> None:
            REAL["replace"](target, source)
            if copy:
                REAL["replace"](copy, target)

        self._changed(target, put_back)
        self._done(strike)

    rename = replace

    def unlink(self, path: Any) -> None:
        strike = os.path.exists(path) and self._strikes("unlink", path)
        copy = self._copy(path)
        REAL["unlink"](path)
        if copy:
            self._changed(path, lambda: REAL["replace"](copy, path))
        self._done(strike)

    def _copy(self, path: Any) -> Path | None:
        if self.spare is None or not os.path.exists(path):
            return None
        copy = self.spare / str(len(self.trace))
        os.link(path, copy)
        return copy

    def _changed(self, path: Any, put_back: Callable[[], None]) -> None:
        self._changes.append(_Change(os.path.dirname(path), put_back))

    def _cut_power(self) -> None:
        for duplicate, synced in self._files:
            size = os.fstat(duplicate).st_size
            if size > synced:
                REAL["ftruncate"](duplicate, self._random.randint(synced, size))
                if self._random.random() < 0.5:  # the length was stored, the data was not
                    REAL["ftruncate"](duplicate, size)
        kept = self._random.randint(0, len(self._changes))
        for change in reversed(self._changes[kept:]):
            change.put_back()
