"""Fault injection for the record store: kills, torn writes, power cuts, full disks. No torch.

    python tests/llmqat/store_faults.py sweep SCRATCH     # every step of several runs, one kill each
    python tests/llmqat/store_faults.py sigkill SCRATCH   # SIGKILL from outside at random times

Each prints one JSON object. The file operations of `llmqat.io` are plain `os` functions, so `Faults` replaces those
in a forked child, counts the steps and strikes at a chosen one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import select
import shutil
import signal
import stat
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmqat.data import Record, RecordWriter, open_dataset, store

STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "ftruncate")
_REAL = {name: getattr(os, name) for name in STEPS}
CONFIG = {"teacher": "tiny", "seed": 3, "sampling": {"temperature": 1.0, "top_k": 0}}


def make_record(record_id: int) -> Record:
    """A record that is a function of its id, as generation makes them."""
    rng = np.random.default_rng(record_id)
    ids = rng.integers(0, 49152, int(rng.integers(1, 12)))
    return Record(record_id, ids, int(ids[0]), 3 + record_id % 3, "hybrid", ("eos", "length")[record_id % 2])


class Faults:
    """Replaces the `os` file functions; at step `at` it strikes.

    kind "before": SIGKILL before the step. "torn": a write is done by half, any other step whole, then SIGKILL.
    "power": SIGKILL before the step, and what was not fsynced is lost: file tails, and the latest renames,
    removals and creations since each folder's last fsync. "enospc": a write is done by half and fails.
    None: only traces. `trace` lists (step, path), where the descriptors' paths are those at opening.
    """

    def __init__(self, kind: str | None = None, at: int = -1, spare: Path | None = None) -> None:
        self.kind, self.at, self.spare = kind, at, spare
        self.trace: list[tuple[str, str]] = []
        self.paths: dict[int, str] = {}
        self.files: list[list[int]] = []  # [fd, own duplicate of it, synced size]
        self.undo: list[tuple[str, str, str, str]] = []  # (folder, step, source, target)
        self.rng = random.Random(at)

    def __enter__(self) -> Faults:
        for name in STEPS:
            setattr(os, name, getattr(self, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name in STEPS:
            setattr(os, name, _REAL[name])

    def step(self, name: str, path: Any) -> bool:
        """Count one step; True where a "torn" or "enospc" strike is due, no return from a kill."""
        self.trace.append((name, str(path)))
        if len(self.trace) - 1 != self.at:
            return False
        if self.kind == "power":
            self.cut_power()
        if self.kind in ("before", "power"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.kind in ("torn", "enospc")

    def die(self, due: bool) -> None:
        if due and self.kind == "torn":
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        creates = bool(flags & os.O_CREAT) and not os.path.exists(path)
        due = creates and self.step("open", path)
        fd = _REAL["open"](path, flags, mode)
        self.paths[fd] = os.fspath(path)
        if flags & (os.O_WRONLY | os.O_RDWR):
            self.files.append([fd, os.dup(fd), os.fstat(fd).st_size])
        if creates:
            self.undo.append((os.path.dirname(path), "create", os.fspath(path), ""))
        self.die(due)
        return fd

    def write(self, fd: int, data: Any) -> int:
        due = self.step("write", self.paths[fd])
        if due:
            _REAL["write"](fd, memoryview(data)[: len(data) // 2])
            self.die(due)
            raise OSError(28, "No space left on device")
        return _REAL["write"](fd, data)

    def fsync(self, fd: int) -> None:
        due = self.step("fsync", self.paths[fd])
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self.undo = [entry for entry in self.undo if entry[0] != self.paths[fd]]
        for entry in self.files:
            if entry[0] == fd:
                entry[2] = os.fstat(fd).st_size
        self.die(due)

    def ftruncate(self, fd: int, size: int) -> None:
        due = self.step("ftruncate", self.paths[fd])
        _REAL["ftruncate"](fd, size)
        self.die(due)

    def replace(self, source: Any, target: Any) -> None:
        due = self.step("replace", target)
        self.undo.append((os.path.dirname(target), "replace", os.fspath(source), os.fspath(target)))
        self.back_up(target)
        _REAL["replace"](source, target)
        self.die(due)

    rename = replace

    def unlink(self, path: Any) -> None:
        due = os.path.exists(path) and self.step("unlink", path)
        self.back_up(path)
        self.undo.append((os.path.dirname(path), "unlink", os.fspath(path), os.fspath(path)))
        _REAL["unlink"](path)
        self.die(due)

    def back_up(self, path: Any) -> None:
        if self.spare is not None and os.path.exists(path):
            os.link(path, self.spare / f"{len(self.trace)}")
            folder, step, source, target = self.undo.pop() if self.undo else ("", "", "", "")
            self.undo.append((folder, step, source, target))

    def cut_power(self) -> None:
        """Bring the disk to a state that a power cut here may leave."""
        for _, fd, synced in self.files:
            size = os.fstat(fd).st_size
            if size > synced:
                _REAL["ftruncate"](fd, self.rng.randint(synced, size))
        lost = self.rng.randint(0, len(self.undo))
        for _, step, source, target in reversed(self.undo[len(self.undo) - lost :]):
            if step == "create" and os.path.exists(source):
                _REAL["unlink"](source)
            elif step == "replace" and os.path.exists(target):
                _REAL["replace"](target, source)
