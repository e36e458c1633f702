"""Which checkpoints of an interrupted run can be trusted.

`transformers.Trainer` writes the files of a checkpoint one after another; a process killed in
between leaves a folder that looks like a checkpoint. Here a checkpoint counts once its marker
exists: written last, after every other file is on disk, with their sizes and SHA-256. A folder
without a marker, or whose files no longer fit it, is set aside under another name (never deleted)
and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from llmqat import io
from llmqat.errors import CheckpointError

__all__ = ["MARKER", "complete_or_raise", "fault", "mark_complete", "newest_complete", "unmark"]

MARKER = "llmqat_complete.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_TORN = "torn-"

logger = logging.getLogger(__name__)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)


def mark_complete(folder: Path, step: int) -> None:
    """Flush every file of a checkpoint to disk, then write its marker."""
    entries = {}
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        entries[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": io.sha256_file(path),
        }
    io.fsync_dir(folder)
    io.write_json(folder / MARKER, {"format": _FORMAT, "step": step, "files": entries})
    io.fsync_dir(folder.parent)


def unmark(folder: Path) -> None:
    """Before files of a checkpoint are written again: it is incomplete from now on."""
    if folder.is_dir():
        io.remove(folder / MARKER)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was written."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"]))
            for name, entry in marker["files"].items()
        }
        known = marker["format"] == _FORMAT
    except FileNotFoundError:
        return "it was never completed"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} is damaged"
    if not known:
        return f"its {MARKER} has another format"
    for name, (
        size,
        _,
    ) in files.items():  # sizes first: a truncated file is found without reading any
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    for name, (_, digest) in files.items():
        if io.sha256_file(folder / name) != digest:
            return f"{name} was altered"
    return None


def complete_or_raise(folder: Path) -> None:
    """Raise CheckpointError, with the reason, unless `folder` is a complete checkpoint."""
    reason = fault(folder)
    if reason is not None:
        raise CheckpointError(f"checkpoint {folder}: {reason}; resume from an earlier one")


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() else -1


def newest_complete(output_dir: Path) -> Path | None:
    """The newest usable checkpoint; unusable newer ones become `torn-checkpoint-<step>`."""
    if not output_dir.is_dir():
        return None
    folders = sorted(
        (path for path in output_dir.iterdir() if _step(path) >= 0), key=_step, reverse=True
    )
    for folder in folders:
        reason = fault(folder)
        if reason is None:
            return folder
        aside = _set_aside(folder)
        logger.warning("%s is not used: %s; kept as %s", folder.name, reason, aside.name)
    return None


def _set_aside(folder: Path) -> Path:
    number, aside = 1, folder.with_name(_TORN + folder.name)
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{_TORN}{folder.name}-{number}")
    try:
        folder.rename(aside)
    except OSError as error:
        raise io.error_at(error, folder, "cannot set aside") from error
    io.fsync_dir(folder.parent)
    return aside
