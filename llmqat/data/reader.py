"""Reading a folder of generated records, or several merged by copying their files together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.data.manifest import FORMAT, Manifest, PartEntry, manifest_files, part_range
from llmqat.data.records import Record, decode_part
from llmqat.errors import DataError

__all__ = ["RecordDataset", "open_dataset", "open_parts"]


class RecordDataset:
    """Checked read access to a record folder; `open_dataset` makes it.

    Iterating yields every `Record` in id order, one part in memory at a time; `len` is the number
    of records, `tokens` of their tokens, `config` the configuration that made them. Record ids
    begin at `first_record`; a part holds `records_per_part`.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, parts: list[PartEntry], verify: bool
    ) -> None:
        self.folder = folder
        self.config: dict[str, Any] = manifest.config
        self.first_record = manifest.first_record
        self.records_per_part = manifest.records_per_part
        self.parts = parts
        self._verify = verify

    def __len__(self) -> int:
        return sum(part.last - part.first + 1 for part in self.parts)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(part.tokens for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all parts: which records these are, without reading any."""
        digests = "\n".join(part.sha256 for part in self.parts)
        return hashlib.sha256(digests.encode()).hexdigest()

    def read_part(self, part: PartEntry) -> list[Record]:
        """The records of one part; `DataError` naming the file that differs from the manifest."""
        path = self.folder / "parts" / part.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise io.error_at(error, path, "cannot read") from error
        if len(data) != part.size:
            raise DataError(f"part {path} has {len(data)} bytes, its manifest says {part.size}")
        if self._verify and hashlib.sha256(data).hexdigest() != part.sha256:
            raise DataError(
                f"part {path} does not match its SHA-256: copy it again or regenerate it"
            )
        records = decode_part(data, str(path))
        if [record.record_id for record in records] != list(range(part.first, part.last + 1)):
            raise DataError(f"part {path} does not hold exactly the records its name says")
        return records

    def __iter__(self) -> Iterator[Record]:
        for part in self.parts:
            yield from self.read_part(part)


def open_dataset(
    folder: str | os.PathLike[str], *, verify_sha256: bool = True, allow_missing: bool = False
) -> RecordDataset:
    """Open a folder of records, checking at once that it is one whole dataset.

    Checked here: the manifests agree, every shard is there, every listed part exists with its size,
    no part is listed twice or stands outside the manifests, no record is missing (`allow_missing`
    reads what is there so far: whole parts only). Checked as each part is read: its SHA-256 (unless
    `verify_sha256` is off), its columns, its ids, its own digest. Raises `DataError` naming the
    file or the first missing record.
    """
    head, parts = open_parts(Path(folder), allow_missing)
    return RecordDataset(Path(folder), head, parts, verify_sha256)


def open_parts(
    folder: Path, allow_missing: bool, format: str = FORMAT
) -> tuple[Manifest, list[PartEntry]]:
    """The first manifest of a folder of `format` and every part, checked as `open_dataset` says."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; name a folder of {format}")
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist")
    manifests = [Manifest.load(path, format) for path in manifest_files(folder)]
    if not manifests:
        raise DataError(f"{folder} has no manifest.json: it is not a folder of {format}")
    head = manifests[0]
    for other in manifests[1:]:
        head.same_run(other, str(folder / other.name), shard=False)
    present = {manifest.shard for manifest in manifests}
    absent = [i for i in range(head.shards) if i not in present]
    if absent and not allow_missing:
        raise DataError(
            f"{folder}: shard {absent[0]} of {head.shards} is missing; "
            "copy its manifest and parts here"
        )
    missing: list[int] = []
    count = 0
    for manifest in manifests:
        for block in manifest.blocks:
            if block not in manifest.parts:
                missing += [manifest.ids(block)[0]]
                count += len(manifest.ids(block))
    if missing and not allow_missing:
        raise DataError(
            f"{folder}: {count} of {head.records} records are not in parts yet, "
            f"first {missing[0]}; finish the run, or pass allow_missing"
        )
    parts = sorted(
        (part for manifest in manifests for part in manifest.parts.values()), key=lambda p: p.first
    )
    _check_files(folder, parts, allow_missing)
    return head, parts


def _check_files(folder: Path, parts: list[PartEntry], allow_extra: bool) -> None:
    """Every listed part is a plain file of its size; a part that no manifest lists may repeat
    records.
    """
    listed = {part.name for part in parts}
    for part in parts:
        path = folder / "parts" / part.name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise DataError(
                f"part {path} is missing: copy it or run the generation again"
            ) from error
        except OSError as error:
            raise io.error_at(error, path, "cannot read") from error
        if size != part.size:
            raise DataError(f"part {path} has {size} bytes, its manifest says {part.size}")
    where = folder / "parts"
    names = sorted(os.listdir(where)) if where.is_dir() else []
    extra = [name for name in names if part_range(name) and name not in listed]
    # While a run goes on, a part stands for a moment before the manifest names it.
    if extra and not allow_extra:
        raise DataError(
            f"part {where / extra[0]} is in no manifest: its records would be duplicates; remove it"
        )
