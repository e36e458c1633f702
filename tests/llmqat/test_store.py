"""llmqat/data/store.py: killed at any moment, nothing lost or repeated."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmqat.data import Record, RecordWriter, open_dataset, store
from llmqat.data.records import encode_part
from llmqat.errors import ConfigError, DataError, LockError
from tests.llmqat.file_faults import Faults
from tests.llmqat.store_faults import (
    PARTS,
    PER_PART,
    RECORDS,
    fill,
    fingerprint,
    make_record,
    run,
    writer,
)


def faults_driver(mode: str, scratch: Path) -> dict[str, int]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.llmqat.store_faults", mode, str(scratch)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the sweep models the disk, so it needs none."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield tmp_path


def test_thousand_kill_points(scratch: Path) -> None:
    """Every file step of six runs, killed before, inside or with the power: the same bytes."""
    result = faults_driver("sweep", scratch)
    assert result["points"] >= 1000 and result["killed"] >= result["points"]
    assert {k: v for k, v in result.items() if k not in ("points", "killed")} == {
        "lost": 0,
        "repeated": 0,
        "wrong_files": 0,
        "failed_children": 0,
    }


def test_kills_while_a_finished_folder_grows(scratch: Path) -> None:
    """The records of the short last part are safe at every step, and its file goes."""
    result = faults_driver("growth", scratch)
    assert result["points"] >= 250 and result["killed"] >= result["points"]
    assert not any(result[k] for k in ("lost", "repeated", "wrong_files", "failed_children"))


def test_the_sweep_notices_a_missing_fsync(scratch: Path) -> None:
    assert faults_driver("unsynced", scratch)["repeated"] > 0


def test_thirty_sigkills_at_random_times(tmp_path: Path) -> None:
    result = faults_driver("sigkill", tmp_path)
    assert result["killed"] == 30
    assert not any(result[k] for k in ("lost", "repeated", "wrong_files", "failed_children"))


def test_order_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write < fsync < rename < fsync(folder) for every file, and the journal is synced before a
    part begins.
    """
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
    assert (
        renames >= 2 * len(PARTS) + 2
    )  # each part and its manifest, the first manifest, the journal


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


def test_no_records_at_all(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {}, records=0) as out:
        assert out.complete and out.missing() == []
    assert list(open_dataset(tmp_path)) == []


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


def test_two_writers(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        with pytest.raises(LockError, match=str(os.getpid())) as caught:
            writer(tmp_path)
        assert "\n" not in str(caught.value)
        out.write(make_record(0))
    writer(tmp_path).close()


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


@pytest.mark.parametrize("before", [7, 10, 0], ids=["short part", "whole parts", "nothing"])
def test_a_finished_folder_grows(tmp_path: Path, before: int) -> None:
    folder = fill(tmp_path / "grown", records=before)
    with writer(folder) as out:
        assert out.missing() == list(range(before, RECORDS))
        assert out.messages == [f"grows from {before} to {RECORDS} records"]
    with pytest.raises(DataError, match="part"):
        open_dataset(folder)
    assert fingerprint(fill(folder)) == fingerprint(fill(tmp_path / "whole"))
    assert not (folder / "quarantine").exists()
    with pytest.raises(DataError, match=f"the folder has {RECORDS}, this run has {before}"):
        writer(folder, records=before)


def test_a_shard_does_not_grow(tmp_path: Path) -> None:
    """Which blocks are a shard's depends on how many there are in all."""
    fill(tmp_path, records=10, shard=(0, 2))
    with pytest.raises(DataError, match="records: the folder has 10, this run has 23"):
        writer(tmp_path, shard=(0, 2))
