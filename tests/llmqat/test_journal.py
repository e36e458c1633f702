"""llmqat/data/journal.py: finished records that wait for their part."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmqat.data import Record, RecordWriter, store
from llmqat.data.records import encode_record
from tests.llmqat.store_faults import (
    make_record,
    writer,
)


def test_journal_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_COMPACT_BYTES", 2000)
    payload = len(encode_record(Record(0, range(100)))) + 8
    with RecordWriter(tmp_path, {}, records=120, records_per_part=4) as out:
        for record_id in range(1, 120):
            out.write(Record(record_id, range(100)))
            assert (tmp_path / "journal.bin").stat().st_size < 2000 + 8 * payload


def test_journal_torn_at_every_byte(tmp_path: Path) -> None:
    with writer(tmp_path / "d") as out:
        for record_id in (1, 8, 22):
            out.write(make_record(record_id))
    journal = tmp_path / "d" / "journal.bin"
    whole = journal.read_bytes()
    ends = [8]
    for record_id in (1, 8, 22):
        ends.append(ends[-1] + 8 + len(encode_record(make_record(record_id))))
    assert ends[-1] == len(whole)
    for cut in range(8, len(whole)):
        data = whole[:cut] + bytes(cut % 3 * 20)  # a power cut may leave zeros behind
        journal.write_bytes(data)
        kept = sum(data[:end] == whole[:end] for end in ends) - 1
        with writer(tmp_path / "d") as out:
            assert out.stored == kept
        assert journal.stat().st_size == ends[kept]


def test_foreign_journal_is_quarantined(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(make_record(0))
    (tmp_path / "journal.bin").write_bytes(b"something else entirely")
    with writer(tmp_path) as out:
        assert out.stored == 0 and "not a record journal" in out.messages[0]
