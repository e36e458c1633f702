"""llmqat/data/{records,journal,manifest,store,reader}.py: killed at any moment, nothing lost or repeated."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_faults import CONFIG, Faults, fingerprint, make_record, run

from llmqat.data import Record, RecordWriter, open_dataset, parse_shard, store
from llmqat.data.records import decode_part, decode_record, encode_part, encode_record
from llmqat.errors import ConfigError, DataError, LockError

RECORDS, PER_PART = 23, 5
PARTS = [
    "part-00000000-00000004.parquet",
    "part-00000005-00000009.parquet",
    "part-00000010-00000014.parquet",
    "part-00000015-00000019.parquet",
    "part-00000020-00000022.parquet",
]


def writer(folder: Path, **changes: Any) -> RecordWriter:
    options = {"records": RECORDS, "records_per_part": PER_PART, **changes}
    return RecordWriter(folder, options.pop("manifest", CONFIG), **options)


def fill(folder: Path, **changes: Any) -> Path:
    with writer(folder, **changes) as out:
        for record_id in out.missing():
            out.write(make_record(record_id))
        assert out.complete
    return folder


def faults_driver(mode: str, scratch: Path) -> dict[str, int]:
    script = Path(__file__).with_name("store_faults.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), mode, str(scratch)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


# Kills


def test_thousand_kill_points(tmp_path: Path) -> None:
    """Every file step of four runs, killed before, inside or with the power: same bytes at the end."""
    result = faults_driver("sweep", tmp_path)
    assert result["points"] >= 1000 and result["killed"] >= result["points"]
    assert {k: v for k, v in result.items() if k not in ("points", "killed")} == {
        "lost": 0,
        "repeated": 0,
        "wrong_files": 0,
        "failed_children": 0,
    }


def test_the_sweep_notices_a_missing_fsync(tmp_path: Path) -> None:
    assert faults_driver("unsynced", tmp_path)["repeated"] > 0


def test_thirty_sigkills_at_random_times(tmp_path: Path) -> None:
    result = faults_driver("sigkill", tmp_path)
    assert result["killed"] == 30
    assert not any(result[k] for k in ("lost", "repeated", "wrong_files", "failed_children"))


def test_order_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write < fsync < rename < fsync(folder) for every file, and the journal is synced before a part begins."""
    monkeypatch.setattr(store, "_COMPACT_BYTES", 64)
    with Faults() as faults:
        run(tmp_path / "d", RECORDS, PER_PART, seed=1)
    trace = faults.trace
    renames = 0
    for at, (step, path) in enumerate(trace):
        if step == "replace":
            renames += 1
            assert trace[at - 1][0] == "fsync" and trace[at - 2][0] == "write"
            assert trace[at - 1][1] == trace[at - 2][1]  # the temporary file
            assert trace[at + 1] == ("fsync", os.path.dirname(path))
        if step == "write" and path.endswith("journal.bin"):
            assert trace[at + 1] == ("fsync", path)
        if step == "unlink" and not path.endswith(".lock"):
            assert trace[at + 1] == ("fsync", os.path.dirname(path))
    assert renames >= 2 * len(PARTS) + 2  # each part and its manifest, the first manifest, the journal


@pytest.mark.parametrize("size", [1, 7])
def test_full_disk_at_every_write(tmp_path: Path, size: int) -> None:
    expected = fingerprint(fill(tmp_path / "whole"))
    ids = list(range(RECORDS))
    random.Random(size).shuffle(ids)

    def attempt(folder: Path) -> None:
        with writer(folder) as out:
            todo = [i for i in ids if i in set(out.missing())]
            for at in range(0, len(todo), size):
                try:
                    out.write([make_record(i) for i in todo[at : at + size]])
                except OSError:
                    with pytest.raises(DataError, match="open it again"):
                        out.write(make_record(todo[-1]))
                    raise

    with Faults() as faults:
        attempt(tmp_path / "traced")
    writes = [at for at, (step, _) in enumerate(faults.trace) if step == "write"]
    assert len(writes) > 10
    for at in writes:
        folder = tmp_path / f"full-{at}"
        with pytest.raises(OSError) as caught, Faults("enospc", at):
            attempt(folder)
        assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(folder.rglob(".*.tmp-*"))
        with Faults():
            attempt(folder)
        assert fingerprint(folder) == expected


def test_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        writer(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        writer(tmp_path / "file" / "sub")


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, mode)

    folder = fill(tmp_path / "d")
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"Read-only.*\.lock"):
        writer(folder)
    assert len(list(open_dataset(folder))) == RECORDS  # reading needs no lock


# What is written


def test_files_do_not_depend_on_order_or_batches(tmp_path: Path) -> None:
    expected = fingerprint(fill(tmp_path / "one"))
    with writer(tmp_path / "batch") as out:
        out.write([make_record(i) for i in reversed(range(RECORDS))])
    assert fingerprint(tmp_path / "batch") == expected
    for seed in range(3):
        run(tmp_path / f"{seed}", RECORDS, PER_PART, seed)
        assert fingerprint(tmp_path / f"{seed}") == expected
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["manifest.json", "parts"]
    assert sorted(os.listdir(tmp_path / "one" / "parts")) == PARTS


def test_manifest_content(tmp_path: Path) -> None:
    folder = fill(tmp_path, manifest={**CONFIG, "versions": {"llmqat": "0"}})
    raw = json.loads((folder / "manifest.json").read_text())
    assert raw["config"] == CONFIG and raw["complete"] is True
    assert raw["versions"][0]["llmqat"] == "0" and "pyarrow" in raw["versions"][0]
    assert [part["file"] for part in raw["parts"]] == PARTS
    assert sum(part["rows"] for part in raw["parts"]) == RECORDS
    assert raw["tokens"] == sum(make_record(i).length for i in range(RECORDS))
    for part in raw["parts"]:
        assert part["bytes"] == (folder / "parts" / part["file"]).stat().st_size


def test_parts_are_plain_parquet(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    table = pq.read_table(folder / "parts")
    assert table.column("record_id").to_pylist() == list(range(RECORDS))
    assert table.column("input_ids").to_pylist() == [
        make_record(i).input_ids.tolist() for i in range(RECORDS)
    ]
    assert str(table.schema.field("input_ids").type).startswith("list<element: int32")
    assert pq.ParquetFile(folder / "parts" / PARTS[0]).metadata.row_group(0).column(0).compression == "ZSTD"


def test_stored_counts(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        assert (out.total, out.stored, out.tokens) == (RECORDS, 0, 0)
        out.write([make_record(i) for i in (0, 1, 2, 3, 4, 7)])
        out.write([])
        assert out.stored == 6 and not out.complete
        assert out.tokens == sum(make_record(i).length for i in (0, 1, 2, 3, 4, 7))
        assert out.missing() == [5, 6, *range(8, RECORDS)]
    with writer(tmp_path) as out:
        assert out.stored == 6 and out.missing() == [5, 6, *range(8, RECORDS)] and not out.messages


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


def test_no_records_at_all(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {}, records=0) as out:
        assert out.complete and out.missing() == []
    assert list(open_dataset(tmp_path)) == []


def test_journal_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_COMPACT_BYTES", 2000)
    payload = len(encode_record(Record(0, range(100)))) + 8
    with RecordWriter(tmp_path, {}, records=400, records_per_part=4) as out:
        for record_id in range(1, 400):
            out.write(Record(record_id, range(100)))
            assert (tmp_path / "journal.bin").stat().st_size < 2000 + 5 * payload


# Wrong records and arguments


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


def test_bad_batches_write_nothing(tmp_path: Path) -> None:
    with writer(tmp_path, manifest={"vocab_size": 100}) as out:
        out.write(Record(3, [5]))
        for batch, words in [
            ([Record(0, [1]), Record(RECORDS, [1])], f"record_id {RECORDS}"),
            ([Record(0, [1]), Record(3, [1])], "record_id 3"),
            ([Record(0, [1]), Record(0, [1])], "record_id 0"),
            ([Record(0, [1]), Record(1, [7, 100])], "token 100"),
        ]:
            with pytest.raises(DataError, match=words):
                out.write(batch)
        assert out.stored == 1
        out.write(Record(0, [1]))
    with pytest.raises(DataError, match="closed"):
        out.write(Record(1, [1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"records": -1}, "records"),
        ({"records": range(0, 10, 2)}, "records"),
        ({"records_per_part": 0}, "records_per_part"),
        ({"shard": (2, 2)}, "shard"),
        ({"shard": "1"}, "shard"),
        ({"shard": "-1/2"}, "shard"),
        ({"manifest": {"x": {1, 2}}}, "manifest"),
        ({"manifest": {"x": float("nan")}}, "manifest"),
        ({"manifest": {"vocab_size": 0}}, "vocab_size"),
        ({"manifest": {"versions": "1"}}, "versions"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        writer(tmp_path / "d", **changes)
    assert not (tmp_path / "d").exists()


def test_parse_shard() -> None:
    assert parse_shard("0/1") == (0, 1) and parse_shard(" 3/8 ") == (3, 8)


# Another run in the same folder


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"manifest": {**CONFIG, "seed": 4}}, "config.seed"),
        ({"manifest": {**CONFIG, "seed": 3.0}}, "config.seed"),
        ({"manifest": {**CONFIG, "sampling": {"temperature": 0.9, "top_k": 0}}}, "config.sampling.temperature"),
        ({"manifest": {**CONFIG, "dtype": "bf16"}}, "config.dtype"),
        ({"manifest": {"teacher": "tiny"}}, "config.sampling"),
        ({"records": RECORDS + 1}, "records"),
        ({"records": range(1, RECORDS)}, "first_record"),
        ({"records_per_part": 6}, "records_per_part"),
        ({"shard": (0, 2)}, "shard.count"),
    ],
)
def test_other_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    folder = fill(tmp_path)
    before = fingerprint(folder)
    with pytest.raises(DataError, match=field) as caught:
        writer(folder, **changes)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert fingerprint(folder) == before
    writer(folder).close()  # and the lock was given back


def test_other_versions_are_recorded(tmp_path: Path) -> None:
    with writer(tmp_path, manifest={**CONFIG, "versions": {"torch": "1"}}) as out:
        out.write(make_record(0))
    for version in ("2", "1"):
        fill(tmp_path, manifest={**CONFIG, "versions": {"torch": version}})
    raw = json.loads((tmp_path / "manifest.json").read_text())
    assert [v["torch"] for v in raw["versions"]] == ["1", "2"]


def test_two_writers(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        with pytest.raises(LockError, match=str(os.getpid())) as caught:
            writer(tmp_path)
        assert "\n" not in str(caught.value)
        out.write(make_record(0))
    writer(tmp_path).close()


def test_lost_manifest(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(make_record(0))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        writer(tmp_path)


# Damage


def test_damaged_part_is_quarantined_and_redone(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    expected = fingerprint(folder)
    part = folder / "parts" / PARTS[1]
    whole = part.read_bytes()
    for turn, damage in enumerate([whole[:-1], whole[:100], b"", whole[:50] + b"\0" + whole[51:]]):
        part.write_bytes(damage)
        with pytest.raises(DataError, match=PARTS[1]):
            list(open_dataset(folder))
        with writer(folder) as out:
            assert out.missing() == [5, 6, 7, 8, 9]
            assert len(out.messages) == 1 and PARTS[1] in out.messages[0]
            assert (folder / "quarantine" / f"{PARTS[1]}.{turn}").read_bytes() == damage
        fill(folder)
        assert fingerprint(folder) == expected


def test_removed_part_is_redone(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    expected = fingerprint(folder)
    (folder / "parts" / PARTS[4]).unlink()
    with pytest.raises(DataError, match=PARTS[4]):
        open_dataset(folder)
    with writer(folder) as out:
        assert out.missing() == [20, 21, 22] and PARTS[4] in out.messages[0]
    assert fingerprint(fill(folder)) == expected


def test_part_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    """A kill between a part and its manifest: the part proves itself by its own digest."""
    folder = fill(tmp_path)
    expected = fingerprint(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["parts"][2:4]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    part = folder / "parts" / PARTS[3]
    part.write_bytes(encode_part([make_record(i) for i in (15, 16, 17, 18, 18)]))
    foreign = folder / "parts" / "part-00000001-00000002.parquet"
    foreign.write_bytes(encode_part([make_record(1), make_record(2)]))
    with writer(folder) as out:
        assert out.missing() == [15, 16, 17, 18, 19]
        assert len(out.messages) == 2
    assert fingerprint(fill(folder)) == expected


def test_every_cut_and_many_flips_of_a_part(tmp_path: Path) -> None:
    """The part's own checks, without the manifest's SHA-256: never other records, only `DataError`."""
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
        journal.write_bytes(whole[:cut] + b"\0" * (cut % 3))  # a cut may leave zeros behind
        kept = sum(end <= cut for end in ends) - 1
        with writer(tmp_path / "d") as out:
            assert out.stored == kept
        assert journal.stat().st_size == ends[kept]


def test_foreign_journal_is_quarantined(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(make_record(0))
    (tmp_path / "journal.bin").write_bytes(b"something else entirely")
    with writer(tmp_path) as out:
        assert out.stored == 0 and "not a record journal" in out.messages[0]


@pytest.mark.parametrize("field", ["format", "format_version", "config", "shard", "records", "parts"])
@pytest.mark.parametrize("value", [None, -1, "x", [1], {"index": 5, "count": 2}])
def test_altered_manifest(tmp_path: Path, field: str, value: Any) -> None:
    folder = fill(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({field: value}, None):
        altered = {**manifest, **change} if change else {k: v for k, v in manifest.items() if k != field}
        (folder / "manifest.json").write_text(json.dumps(altered))
        if change and field == "config" and isinstance(value, dict):
            continue  # a config may hold anything; the writer compares it
        for use in (writer, open_dataset):
            with pytest.raises(DataError, match=r"manifest\.json") as caught:
                use(folder)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../../etc/passwd"),
        ("file", PARTS[1]),
        ("file", "part-00000000-00000003.parquet"),
        ("rows", 4),
        ("sha256", "0"),
        ("bytes", -1),
        ("tokens", True),
    ],
)
def test_altered_part_entry(tmp_path: Path, key: str, value: Any) -> None:
    folder = fill(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(folder)


def test_truncated_manifest(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    text = (folder / "manifest.json").read_bytes()
    for cut in range(0, len(text) - 2, 37):
        (folder / "manifest.json").write_bytes(text[:cut])
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_dataset(folder)


# Reading


def test_reader_checks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(tmp_path)
    with writer(tmp_path / "d") as out:
        out.write([make_record(i) for i in range(7)])
    with pytest.raises(DataError, match="18 of 23 records .* first 5"):
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
    with pytest.raises(DataError, match="part-00000003-00000006.* duplicates"):
        open_dataset(folder)


# Shards


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
