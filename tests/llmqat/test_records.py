"""llmqat/data/records.py: the two byte forms of a record."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmqat.data import Record, RecordWriter, open_dataset
from llmqat.data.records import decode_part, decode_record, encode_part, encode_record
from llmqat.errors import DataError
from tests.llmqat.store_faults import (
    PARTS,
    PER_PART,
    RECORDS,
    fill,
    make_record,
)


def test_parts_are_plain_parquet(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    table = pq.read_table(folder / "parts")
    assert table.column("record_id").to_pylist() == list(range(RECORDS))
    assert table.column("input_ids").to_pylist() == [
        make_record(i).input_ids.tolist() for i in range(RECORDS)
    ]
    assert str(table.schema.field("input_ids").type).startswith("list<element: int32")
    assert (
        pq.ParquetFile(folder / "parts" / PARTS[0]).metadata.row_group(0).column(0).compression
        == "ZSTD"
    )


def test_empty_and_extreme_records(tmp_path: Path) -> None:
    records = [
        Record(0, []),
        Record(1, np.array([2**31 - 1], np.int64), 0, 0, "", "läng"),
        Record(2, np.zeros(3000, np.uint16), 5, -1, "x" * 65535, "y"),
    ]
    with RecordWriter(tmp_path, {}, records=3) as out:
        out.write(records[:2])
    with RecordWriter(tmp_path, {}, records=3) as out:
        out.write(records[2])
    assert list(open_dataset(tmp_path)) == records
    assert all(decode_record(encode_record(record)) == record for record in records)
    assert decode_part(encode_part(records), "p") == records


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Record(-1, [1]), "record_id -1"),
        (lambda: Record(2**63, [1]), "record_id"),
        (lambda: Record(0, [[1]]), "input_ids"),
        (lambda: Record(0, [1.5]), "input_ids"),
        (lambda: Record(0, [-1]), "input_ids"),
        (lambda: Record(0, [2**31]), "input_ids"),
        (lambda: Record(0, [1], seed_token=-2), "seed_token"),
        (lambda: Record(0, [1], n_greedy=2**31), "n_greedy"),
        (lambda: Record(0, [1], strategy="x" * 65536), "strategy"),
        (lambda: Record(0, [1], finish_reason=3), "finish_reason"),
    ],
)
def test_bad_records(build: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_every_cut_and_many_flips_of_a_part(tmp_path: Path) -> None:
    """The part's own checks, without the manifest's SHA-256: its records or a `DataError`."""
    records = [make_record(i) for i in range(PER_PART)]
    data = encode_part(records)
    rng = random.Random(0)
    same = 0
    for cut in range(0, len(data), max(1, len(data) // 100)):
        with pytest.raises(DataError, match=r"p\.parquet"):
            decode_part(data[:cut], "p.parquet")
    for _ in range(1000):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            same += decode_part(bytes(changed), "p.parquet") == records
        except DataError as error:
            assert "p.parquet" in str(error) and "\n" not in str(error)
        else:
            assert decode_part(bytes(changed), "p.parquet") == records
    assert same < 500  # statistics and names in the footer are not records
