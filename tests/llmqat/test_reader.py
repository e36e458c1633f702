"""llmqat/data/reader.py: one whole dataset or an error; shards merge by copying."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from llmqat.data import open_dataset
from llmqat.data.records import encode_part
from llmqat.errors import DataError, LockError
from tests.llmqat.store_faults import (
    CONFIG,
    PARTS,
    RECORDS,
    fill,
    make_record,
    writer,
)


def test_reader_checks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(tmp_path)
    with writer(tmp_path / "d") as out:
        out.write([make_record(i) for i in range(7)])
    with pytest.raises(DataError, match=r"18 of 23 records .* first 5"):
        open_dataset(tmp_path / "d")
    partial = open_dataset(tmp_path / "d", allow_missing=True)
    assert [record.record_id for record in partial] == [0, 1, 2, 3, 4]


def test_reader_verifies_contents(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    data = open_dataset(folder)
    assert len(data) == RECORDS and data.config == CONFIG
    assert list(data) == [make_record(i) for i in range(RECORDS)]
    assert data.tokens == sum(record.length for record in data)
    part = folder / "parts" / PARTS[2]
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match=f"{PARTS[2]} .*SHA-256"):
        list(open_dataset(folder))
    part.write_bytes(content[:-4])
    with pytest.raises(DataError, match=PARTS[2]):
        open_dataset(folder)


def test_duplicate_ids_are_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    extra = folder / "parts" / "part-00000003-00000006.parquet"
    extra.write_bytes(encode_part([make_record(i) for i in range(3, 7)]))
    with pytest.raises(DataError, match=r"part-00000003-00000006.* duplicates"):
        open_dataset(folder)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_shards_merge_into_the_unsharded_parts(tmp_path: Path, count: int) -> None:
    whole = fill(tmp_path / "whole")
    merged = tmp_path / "merged"
    for index in range(count):
        folder = fill(tmp_path / f"{index}", shard=f"{index}/{count}")
        if index:
            with pytest.raises(DataError, match="shard"):
                open_dataset(merged)
        shutil.copytree(folder, merged, dirs_exist_ok=True)
    assert list(open_dataset(merged)) == list(open_dataset(whole))
    for name in PARTS:
        assert (merged / "parts" / name).read_bytes() == (whole / "parts" / name).read_bytes()


def test_shards_write_one_folder_at_the_same_time(tmp_path: Path) -> None:
    writers = [writer(tmp_path, shard=(i, 3)) for i in range(3)]
    with pytest.raises(LockError):
        writer(tmp_path, shard=(1, 3))
    assert sorted(i for out in writers for i in out.missing()) == list(range(RECORDS))
    todo = [(out, i) for out in writers for i in out.missing()]
    random.Random(0).shuffle(todo)
    for out, record_id in todo:
        out.write(make_record(record_id))
    for out in writers:
        out.close()
    assert list(open_dataset(tmp_path)) == [make_record(i) for i in range(RECORDS)]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        f"manifest-{i}-of-3.json" for i in range(3)
    ]


def test_shards_of_other_runs_do_not_mix(tmp_path: Path) -> None:
    fill(tmp_path / "a", shard=(0, 2))
    fill(tmp_path / "b", shard=(1, 2), manifest={**CONFIG, "seed": 4})
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"config\.seed"):
        open_dataset(tmp_path / "a")
    with pytest.raises(DataError, match=r"config\.seed"):
        writer(tmp_path / "a", shard=(0, 2))


def test_range_of_ids(tmp_path: Path) -> None:
    with writer(tmp_path, records=range(100, 112)) as out:
        assert out.missing() == list(range(100, 112))
        out.write([make_record(i) for i in out.missing()])
    assert [record.record_id for record in open_dataset(tmp_path)] == list(range(100, 112))
    assert sorted(os.listdir(tmp_path / "parts"))[0] == "part-00000100-00000104.parquet"
