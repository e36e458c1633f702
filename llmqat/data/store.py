"""The writer of generated records: killed at any moment, it loses and repeats nothing.

A batch is on disk (journal, one fsync) when `RecordWriter.write` returns. When the last record of a
block arrives, the block becomes a parquet part, then the manifest names it, then the journal
forgets it; each step is atomic, and a restart finishes whichever step was cut short. The layout is
in docs/data-format.md.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from llmqat import io
from llmqat.data.journal import Journal
from llmqat.data.manifest import (
    Manifest,
    PartEntry,
    manifest_files,
    parse_shard,
    part_range,
    plain_json,
)
from llmqat.data.records import TOKENS, RecordForm, Stored
from llmqat.errors import ConfigError, DataError

__all__ = ["RecordWriter", "parse_shard"]

_log = logging.getLogger("llmqat.data")

# Dead bytes that a journal may hold before it is rewritten. Half of it may be dead, so that
# rewriting costs at most one more write of each record.
_COMPACT_BYTES = 1 << 20


class RecordWriter:
    """Writes the records `records` (a count, or a range of ids), or shard i of n of them, into
    `folder`.

        with RecordWriter(folder, {"teacher": ..., "seed": 0}, records=1000) as writer:
            for record_id in writer.missing():
                writer.write(Record(record_id, ids))

    `manifest` is the configuration that decides the records: a folder begun with another one is
    refused, naming the field. One of the same configuration and fewer records grows, unless it is
    sharded. Its key "versions" (a dict) is recorded only; its key "vocab_size",
    if there, bounds the token ids. `shard` is (i, n) or "i/n"; shards write into one folder or into
    several that are merged by copying. `records_per_part` trades file count against the size of one
    part. `form` is the kind of record.

    Opening repairs what a kill left behind: temporary files are removed, a torn journal tail is
    cut, a part that does not verify moves to `quarantine/` and its records become missing.
    `messages` says what was done (also logged as warnings of "llmqat.data").

    Raises `ConfigError` (arguments; `LockError` if another process writes this shard), `DataError`
    (the folder holds another run, or was altered) and `OSError` naming the path (disk full, folder
    not writable).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        *,
        records: int | range,
        shard: tuple[int, int] | str = (0, 1),
        records_per_part: int = 128,
        form: RecordForm = TOKENS,
    ) -> None:
        ids = range(records) if isinstance(records, int) else records
        if ids.step != 1 or ids.start < 0 or ids.stop < ids.start:
            raise ConfigError(f"records {records}: give a count >= 0 or a range of ids with step 1")
        if records_per_part < 1:
            raise ConfigError(f"records_per_part {records_per_part}: must be at least 1")
        index, count = parse_shard(shard if isinstance(shard, str) else f"{shard[0]}/{shard[1]}")
        config = plain_json(manifest, "manifest")
        versions = config.pop("versions", {})
        if not isinstance(versions, dict):
            raise ConfigError(
                f"manifest versions {versions!r}: must be a dict of names to versions"
            )
        versions = {"pyarrow": pa.__version__, **versions}
        vocab = config.get("vocab_size")
        if vocab is not None and (not isinstance(vocab, int) or vocab < 1):
            raise ConfigError(f"manifest vocab_size {vocab!r}: must be a positive integer")
        self.folder = Path(folder)
        self.messages: list[str] = []
        self._vocab_size: int | None = vocab
        self._form = form
        self._manifest = Manifest(
            config, ids.start, len(ids), records_per_part, index, count, form.format, [versions]
        )
        self._pending: dict[int, dict[int, Stored]] = {}  # block -> id -> record
        self._live_bytes = 0
        self._short: dict[str, Sequence[Stored]] = {}  # parts of blocks that have grown
        self._journal: Journal | None = None
        self._failed = False
        tag = "" if count == 1 else f"-{self._manifest.tag}"
        self._parts = self.folder / "parts"
        self._journal_path = self.folder / f"journal{tag}.bin"
        io.make_dir(self._parts)
        self._lock = io.Lock(self.folder / f".lock{tag}")
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # What is stored

    @property
    def total(self) -> int:
        """Number of records that this shard is to hold."""
        return len(self._manifest.all_ids)

    @property
    def stored(self) -> int:
        """Number of records that are safe on disk."""
        parts = sum(part.last - part.first + 1 for part in self._manifest.parts.values())
        return parts + sum(map(len, self._pending.values()))

    @property
    def tokens(self) -> int:
        """Number of tokens that are safe on disk."""
        parts = sum(part.tokens for part in self._manifest.parts.values())
        return parts + sum(r.length for block in self._pending.values() for r in block.values())

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self._manifest.complete

    def missing(self) -> list[int]:
        """The record ids that remain to be made, ascending."""
        return [
            record_id
            for block in self._manifest.blocks
            if block not in self._manifest.parts
            for record_id in self._manifest.ids(block)
            if record_id not in self._pending.get(block, ())
        ]

    # Writing

    def write(self, records: Stored | Iterable[Stored]) -> None:
        """Store one record or a batch, in any order of ids; on return they survive a power cut.

        A batch costs one fsync, so hand over what finished together. Raises `DataError` before
        anything is written for an id outside this shard, an id stored already, or a token outside
        the vocabulary; `OSError` when the disk refuses: then open the folder again, which continues
        from what is safe.
        """
        batch = list(records) if isinstance(records, Iterable) else [records]
        if self._failed or not self._lock.held:
            why = "an earlier write failed" if self._failed else "it is closed"
            raise DataError(
                f"writer of {self.folder} cannot write: {why}; open it again to continue"
            )
        seen: set[int] = set()
        for record in batch:
            self._check(record, seen)
        if not batch:
            return
        self._failed = True  # until all steps are through: half a step must not be built upon
        payloads = [self._form.encode(record) for record in batch]
        if self._journal is None:
            self._journal = Journal(self._journal_path)
        self._journal.append(payloads)
        self._keep(batch, payloads)
        self._finish_full_blocks()
        self._failed = False

    def _check(self, record: Stored, seen: set[int]) -> None:
        rid = record.record_id
        ids = self._manifest.all_ids
        if rid not in ids:
            raise DataError(f"record_id {rid}: this shard holds {ids.start}..{ids.stop - 1}")
        block = self._manifest.block_of(rid)
        if rid in seen or block in self._manifest.parts or rid in self._pending.get(block, ()):
            raise DataError(f"record_id {rid}: it is stored already; write only missing() ids")
        seen.add(rid)
        if self._vocab_size is not None and record.top_token >= self._vocab_size:
            raise DataError(
                f"record {rid}: token {record.top_token} is outside vocab_size {self._vocab_size}"
            )

    def _keep(self, records: Iterable[Stored], payloads: Iterable[bytes]) -> None:
        for record, payload in zip(records, payloads, strict=True):
            block = self._manifest.block_of(record.record_id)
            self._pending.setdefault(block, {})[record.record_id] = record
            self._live_bytes += len(payload)

    def _finish_full_blocks(self) -> None:
        for block in sorted(self._pending):
            ids = self._manifest.ids(block)
            if len(self._pending[block]) == len(ids):
                self._finish(block, ids)
        if self._manifest.complete:
            self._drop_journal()
        elif self._journal is not None:
            dead = self._journal.size - self._live_bytes
            if dead > max(self._live_bytes, _COMPACT_BYTES):
                self._journal.replace(
                    self._form.encode(r) for block in self._pending.values() for r in block.values()
                )

    def _finish(self, block: int, ids: range) -> None:
        records = [self._pending[block][record_id] for record_id in ids]
        data = self._form.encode_part(records)
        entry = _entry(ids, records, data)
        io.write_bytes(self._parts / entry.name, data)
        self._manifest.parts[block] = entry
        self._manifest.save(self.folder)
        del self._pending[block]
        self._live_bytes -= sum(len(self._form.encode(record)) for record in records)

    def _drop_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        io.remove(self._journal_path)

    # Opening

    def _open(self) -> None:
        manifest = self._manifest
        io.remove_temps(self.folder, lambda name: name in (manifest.name, self._journal_path.name))
        io.remove_temps(self._parts, lambda name: self._is_mine(part_range(name)))
        own = self.folder / manifest.name
        before = None
        for path in manifest_files(self.folder):
            found = Manifest.load(path, self._form.format)
            manifest.same_run(found, str(path), shard=path == own, grow=True)
            if path == own:
                before = found.to_dict()
                manifest.parts = {b: p for b, p in found.parts.items() if manifest.is_whole(p)}
                if found.records < manifest.records:
                    self._say(f"grows from {found.records} to {manifest.records} records")
                new = [v for v in manifest.versions if v not in found.versions]
                manifest.versions = found.versions + new
        if before is None and (self._journal_path.exists() or self._part_files()):
            raise DataError(
                f"{self.folder} holds parts or a journal but no {manifest.name}: "
                "restore it or use another folder"
            )
        self._verify_parts()
        if manifest.to_dict() != before:
            manifest.save(self.folder)
        if self._journal_path.exists():
            self._read_journal()
        self._open_short_parts()
        self._finish_full_blocks()

    def _is_mine(self, bounds: tuple[int, int] | None) -> bool:
        ids = self._manifest.all_ids
        return bounds is not None and bounds[0] < ids.stop and bounds[1] >= ids.start

    def _part_files(self) -> list[str]:
        return sorted(n for n in os.listdir(self._parts) if self._is_mine(part_range(n)))

    def _verify_parts(self) -> None:
        listed, self._manifest.parts = self._manifest.parts, {}
        on_disk = self._part_files()
        for entry in listed.values():
            if entry.name not in on_disk:
                self._say(f"part {entry.name} is gone; its records will be made again")
        for name in on_disk:
            bounds = part_range(name)
            assert bounds is not None
            block = self._manifest.block_of(max(bounds[0], self._manifest.all_ids.start))
            ids = self._manifest.ids(block)
            try:
                if bounds[0] != ids[0] or bounds[1] not in ids:
                    raise DataError(f"part {name} is not one of this run's parts")
                data = (self._parts / name).read_bytes()
                if bounds[1] != ids[-1]:
                    self._short[name] = decode_part(
                        data, name, range(ids[0], bounds[1] + 1), self._form
                    )
                    continue
                entry = check_part(data, name, ids, listed.get(block), self._form)
            except OSError as error:
                raise io.error_at(error, self._parts / name, "cannot read") from error
            except DataError as error:
                self._quarantine(self._parts / name, error)
            else:
                self._manifest.parts[block] = entry

    def _read_journal(self) -> None:
        try:
            self._journal = Journal(self._journal_path)
        except DataError as error:
            self._quarantine(self._journal_path, error)
            return
        if self._journal.dropped_bytes:
            self._say(
                f"{self._journal_path.name}: cut a torn tail of {self._journal.dropped_bytes} bytes"
            )
        for payload in self._journal.payloads:
            record = self._form.decode(payload)
            block = self._manifest.block_of(record.record_id)
            if record.record_id not in self._manifest.all_ids:
                raise DataError(
                    f"{self._journal_path}: record {record.record_id} is not of this run"
                )
            # A part holds it already when the kill fell between the part and the journal's
            # rewriting.
            stored = block in self._manifest.parts or record.record_id in self._pending.get(
                block, ()
            )
            if not stored:
                self._keep([record], [payload])
        self._journal.payloads = []

    def _open_short_parts(self) -> None:
        """Records of a block that has grown go back to the journal, then their part goes."""
        for name, records in self._short.items():
            block = self._manifest.block_of(records[0].record_id)
            pending = self._pending.get(block, {})
            back = [record for record in records if record.record_id not in pending]
            if back and block not in self._manifest.parts:
                payloads = [self._form.encode(record) for record in back]
                if self._journal is None:
                    self._journal = Journal(self._journal_path)
                self._journal.append(payloads)
                self._keep(back, payloads)
            io.remove(self._parts / name)
        self._short = {}

    def _quarantine(self, path: Path, error: DataError) -> None:
        folder = io.make_dir(self.folder / "quarantine")
        number = sum(1 for name in os.listdir(folder) if name.startswith(path.name + "."))
        target = folder / f"{path.name}.{number}"
        os.rename(path, target)
        io.fsync_dir(folder)
        io.fsync_dir(path.parent)
        self._say(f"{error}; moved to {target}, its records will be made again")

    def _say(self, message: str) -> None:
        self.messages.append(message)
        _log.warning("%s", message)

    # Closing

    def close(self) -> None:
        """Release the folder. Nothing waits in memory: `write` has stored it all."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _entry(ids: range, records: Sequence[Stored], data: bytes) -> PartEntry:
    tokens = sum(record.length for record in records)
    return PartEntry(ids[0], ids[-1], tokens, len(data), hashlib.sha256(data).hexdigest())


def check_part(
    data: bytes, name: str, ids: range, entry: PartEntry | None, form: RecordForm
) -> PartEntry:
    """Verify the bytes of one part against its manifest entry, or without one against itself."""
    if entry is not None:
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DataError(f"part {name} does not match the size and SHA-256 in the manifest")
        return entry
    return _entry(ids, decode_part(data, name, ids, form), data)


def decode_part(data: bytes, name: str, ids: range, form: RecordForm) -> Sequence[Stored]:
    """The records of one part, verified against its own digest and the ids that its name says."""
    records = form.decode_part(data, name)
    if [record.record_id for record in records] != list(ids):
        raise DataError(f"part {name} does not hold the records {ids[0]}..{ids[-1]}")
    return records
