"""The journal: records that are finished but whose part is not full yet, safe on disk.

Append-only file of frames `u32 length | u32 crc32(payload) | payload`, little endian, after an
eight-byte magic. One fsync per batch. A torn tail (the process died inside a write) is dropped on
opening: those records were never reported as stored, so they are only generated again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

from llmqat import io
from llmqat.errors import DataError

__all__ = ["Journal"]

MAGIC = b"LQJRNL1\n"
_FRAME = struct.Struct("<II")


def _frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


class Journal:
    """An append-only list of byte strings in `path`, created if it is missing.

    `payloads` holds what was on disk when it was opened, `dropped_bytes` the length of a torn tail
    that was cut off, `size` the file's bytes. Raises `DataError` for a file that is no journal,
    `OSError` (naming the path) for a disk that refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.payloads: list[bytes] = []
        self.dropped_bytes = 0
        if not path.exists():
            io.write_bytes(path, MAGIC)
        try:
            self._fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise io.error_at(error, path, "cannot open") from error
        try:
            self.size = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def _recover(self) -> int:
        data = self.path.read_bytes()
        if data[: len(MAGIC)] != MAGIC:
            raise DataError(f"{self.path} is not a record journal")
        good = len(MAGIC)
        while good + _FRAME.size <= len(data):
            length, crc = _FRAME.unpack_from(data, good)
            payload = data[good + _FRAME.size : good + _FRAME.size + length]
            # Length 0 is never written: a power cut may leave zeros, and crc32(b"") is 0.
            if not length or len(payload) != length or zlib.crc32(payload) != crc:
                break
            self.payloads.append(payload)
            good += _FRAME.size + length
        self.dropped_bytes = len(data) - good
        if self.dropped_bytes:
            os.ftruncate(self._fd, good)
            os.fsync(self._fd)
        os.lseek(self._fd, good, os.SEEK_SET)
        return good

    def append(self, payloads: Iterable[bytes]) -> None:
        """Add a batch; on return all of it survives a power cut."""
        data = b"".join(_frame(payload) for payload in payloads)
        try:
            io.write_all(self._fd, data)
            os.fsync(self._fd)
        except OSError as error:
            raise io.error_at(error, self.path) from error
        self.size += len(data)

    def replace(self, payloads: Iterable[bytes]) -> None:
        """Set the whole content, atomically: before or after, nothing between."""
        data = MAGIC + b"".join(_frame(payload) for payload in payloads)
        io.write_bytes(self.path, data)
        fd = os.open(self.path, os.O_RDWR)
        os.lseek(fd, 0, os.SEEK_END)
        os.close(self._fd)
        self._fd, self.size = fd, len(data)

    def close(self) -> None:
        """Close the file; it stays on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
