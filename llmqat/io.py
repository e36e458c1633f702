"""How this package puts bytes on a disk: every file it writes goes through this module.

A file appears under its name complete or not at all, also through SIGKILL, a full disk or a power
cut: the bytes go to a temporary file in the same folder, which is flushed, fsynced and renamed, and
then the folder is fsynced (without the last step a power cut may undo the rename). Standard library
only, so that writers and their kill tests start in milliseconds. POSIX (Linux, macOS).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmqat.errors import LockError

__all__ = [
    "Lock",
    "atomic_path",
    "atomic_write",
    "error_at",
    "fsync_dir",
    "make_dir",
    "remove",
    "remove_temps",
    "sha256_file",
    "write_all",
    "write_bytes",
    "write_json",
    "write_text",
]

StrPath = str | os.PathLike[str]

_TEMP_MARK = ".tmp-"


def error_at(error: OSError, path: StrPath, what: str = "cannot write") -> OSError:
    """`error` as one line that names `path`; the class (PermissionError, ...) follows the errno."""
    if error.errno is None:
        return OSError(errno.EIO, f"{what}: {error}", os.fspath(path))
    return OSError(error.errno, f"{what}: {os.strerror(error.errno)}", os.fspath(path))


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of `data` to `fd` (a plain `os.write` may stop early)."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(fd, view) :]


def fsync_dir(folder: StrPath) -> None:
    """Make the names in `folder` durable (created, renamed and removed files)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(folder: StrPath) -> Path:
    """Create `folder` and its parents durably; a folder that exists is left alone.

    Raises an `OSError` naming the folder when it cannot be made, or when a file has its name.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    try:
        if path.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if path.parent != path:
            make_dir(path.parent)
        path.mkdir(exist_ok=True)
        fsync_dir(path.parent)
    except OSError as error:
        raise error_at(error, path, "cannot make the folder") from error
    return path


class _RawFile(io.RawIOBase):
    """A writable file over one descriptor; each `write` is `os.write` until all bytes are out."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        write_all(self.fd, view)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self.fd, offset, whence)

    def tell(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_CUR)


def _temp_name(path: Path) -> Path:
    """A fresh name beside `path` (a rename is atomic only within one file system)."""
    return path.with_name(f".{path.name}{_TEMP_MARK}{secrets.token_hex(4)}")


def _publish(temp: Path, path: Path) -> None:
    """Give the fsynced `temp` its name, durably."""
    os.replace(temp, path)
    fsync_dir(path.parent)


@contextmanager
def atomic_write(path: StrPath) -> Iterator[io.RawIOBase]:
    """Open a binary file that appears at `path` when the block ends well, and never otherwise.

    The file is unbuffered: wrap it for many small writes, and flush the wrapper inside the block.
    On any exception the temporary file is removed and what stood at `path` stays. An `OSError` of
    the file operations is raised again with `path` in its text.
    """
    path = Path(path)
    temp = _temp_name(path)
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise error_at(error, path) from error
    try:
        file = _RawFile(fd)
        try:
            yield file
            os.fsync(fd)
        finally:
            file.close()
            os.close(fd)
        _publish(temp, path)
    except BaseException as error:
        with suppress(OSError):  # already renamed, or the disk is gone: the first error tells more
            os.unlink(temp)
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temp)):
            raise error_at(error, path) from error
        raise


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Like `atomic_write` for libraries that want a file name: yields the temporary path to write
    to.

    The file is opened again and fsynced before the rename (safetensors' `save_file`, for one, does
    not fsync).
    """
    path = Path(path)
    temp = _temp_name(path)
    try:
        yield temp
        fd = os.open(temp, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        _publish(temp, path)
    except BaseException as error:
        with suppress(OSError):  # never created, or already renamed
            os.unlink(temp)
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temp)):
            raise error_at(error, path) from error
        raise


def write_bytes(path: StrPath, data: bytes | memoryview) -> None:
    """Replace the file at `path` by `data`, atomically and durably."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: StrPath, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, atomically and durably."""
    write_bytes(path, text.encode())


def write_json(path: StrPath, value: Any) -> None:
    """Replace the file at `path` by `value` as indented JSON (NaN and infinities are refused)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def remove(path: StrPath) -> None:
    """Remove a file durably; a file that is not there is fine."""
    try:
        os.unlink(path)
        fsync_dir(Path(path).parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise error_at(error, path, "cannot remove") from error


def remove_temps(folder: StrPath, belongs: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Remove temporary files that a killed writer left in `folder`; returns their final names.

    `belongs(final_name)` limits it to the caller's own files, where writers share a folder. Call it
    only under the lock that covers those files.
    """
    removed = []
    for entry in sorted(os.listdir(folder)):
        final, mark, _ = entry[1:].rpartition(_TEMP_MARK)
        if entry.startswith(".") and mark and belongs(final):
            os.unlink(os.path.join(folder, entry))
            removed.append(final)
    return removed


def sha256_file(path: StrPath) -> str:
    """SHA-256 of a file's bytes, in lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """One writer per output folder, for as long as its process lives.

    The kernel holds the lock (`flock`), so that a killed holder's lock is free at once, whatever
    process has its pid by then; the file carries the pid for the message that a second writer gets:

        with Lock(folder / ".lock"):
            ...

    Entering raises `LockError` while another live process (or this one) holds it, and `OSError`
    naming the path where the folder cannot be written.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._fd: int | None = None
        self._pid = 0

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def fileno(self) -> int:
        """The descriptor that holds the lock: a child that inherits it holds the lock as well, also
        after this process was killed.

        Raises:
            LockError: it is not held.
        """
        if self._fd is None:
            raise LockError(f"lock {self.path}: not held; acquire it first")
        return self._fd

    def acquire(self) -> None:
        """Take the lock, or raise `LockError` at once."""
        if self._fd is not None:
            raise LockError(f"lock {self.path}: this object holds it already; release it first")
        while self._fd is None:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise error_at(error, self.path, "cannot lock") from error
            try:
                self._take(fd)
            except BaseException:
                os.close(fd)
                raise
            # A holder that released between our open and our lock has removed this file: its lock
            # would guard nothing, so look again.
            try:
                same = os.path.samestat(os.fstat(fd), os.stat(self.path))
            except FileNotFoundError:
                same = False
            if same:
                self._fd, self._pid = fd, os.getpid()
            else:
                os.close(fd)

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise LockError(
                f"output folder {self.path.parent} is being written by process {pid} "
                f"({self.path.name}); wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise error_at(error, self.path, "cannot lock") from error
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise error_at(error, self.path, "cannot lock") from error

    def release(self) -> None:
        """Give the lock back and remove its file. Does nothing if it is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        if os.getpid() == self._pid:  # a forked child holds a copy: the lock stays its parent's
            with suppress(
                OSError
            ):  # a read-only or vanished folder: closing releases the lock anyway
                os.unlink(self.path)
        os.close(fd)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
