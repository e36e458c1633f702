"""Fault injection for the record store: kills, torn writes, power cuts, full disks. No torch.

    python -m tests.llmqat.store_faults MODE SCRATCH

sweep: every step of several runs, one strike each. growth: the same of runs that make a finished
folder larger. unsynced: a few strikes at a writer that skips one fsync. sigkill: SIGKILL from
outside at random times.

Each prints one JSON object. `llmqat.io` calls plain `os` functions for every step that can matter,
so `Faults` replaces those in a forked child, counts the steps and strikes at a chosen one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.data import Record, RecordWriter, journal, open_dataset, store
from tests.llmqat.file_faults import REAL, Faults

Stored = Callable[[list[int]], object]  # tells the parent which ids are safe

RECORDS, PER_PART = 23, 5
PARTS = [
    "part-00000000-00000004.parquet",
    "part-00000005-00000009.parquet",
    "part-00000010-00000014.parquet",
    "part-00000015-00000019.parquet",
    "part-00000020-00000022.parquet",
]
CONFIG = {"teacher": "tiny", "seed": 3, "sampling": {"temperature": 1.0, "top_k": 0}}


def make_record(record_id: int) -> Record:
    """A record that is a function of its id, as generation makes them."""
    rng = random.Random(record_id)
    ids = [rng.randrange(49152) for _ in range(rng.randint(1, 12))]
    reason = ("eos", "length")[record_id % 2]
    return Record(record_id, ids, ids[0], 3 + record_id % 3, "hybrid", reason)


def run(
    folder: Path,
    records: int,
    per_part: int,
    seed: int,
    stored: Stored = lambda ids: None,
    pause: float = 0.0,
) -> list[int]:
    """Make what is missing, out of order and in uneven batches; returns the ids that were made."""
    made = []
    with RecordWriter(folder, CONFIG, records=records, records_per_part=per_part) as writer:
        rng = random.Random(seed)
        todo = sorted(writer.missing(), key=lambda i: i + rng.uniform(0, 2.5 * per_part))
        while todo:
            size = rng.randint(1, 4)
            batch, todo = todo[:size], todo[size:]
            if pause:
                time.sleep(pause)
            writer.write([make_record(i) for i in batch])
            stored(batch)
            made += batch
    return made


def writer(folder: Path, **changes: Any) -> RecordWriter:
    """A writer of RECORDS records, `changes` being other arguments."""
    options = {"records": RECORDS, "records_per_part": PER_PART, **changes}
    return RecordWriter(folder, options.pop("manifest", CONFIG), **options)


def fill(folder: Path, **changes: Any) -> Path:
    """Write all that is missing; returns `folder`."""
    with writer(folder, **changes) as out:
        for record_id in out.missing():
            out.write(make_record(record_id))
        assert out.complete
    return folder


def fingerprint(folder: Path) -> str:
    """Hash over the names and bytes of everything in `folder` but the quarantine."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "quarantine" not in path.parts:
            total.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


@contextmanager
def child(work: Callable[[Stored], object]) -> Iterator[tuple[int, int]]:
    """Fork; `work(stored)` runs in the child. Yields (pid, pipe of the ids that were reported as
    stored).
    """
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            work(lambda ids: REAL["write"](into, struct.pack(f"<{len(ids)}q", *ids)))
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}\n")
        os._exit(1)
    os.close(into)
    try:
        yield pid, out
    finally:
        os.close(out)


def reap(pid: int, out: int) -> tuple[int, list[int]]:
    """Wait for the child: (its signal or exit status, the ids it reported)."""
    data = b""
    while chunk := os.read(out, 1 << 16):
        data += chunk
    status = os.waitpid(pid, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, list(struct.unpack(f"<{len(data) // 8}q", data))


class Tally:
    """Counts of what went wrong, over all kills."""

    def __init__(self) -> None:
        self.result = {
            "points": 0,
            "killed": 0,
            "lost": 0,
            "repeated": 0,
            "wrong_files": 0,
            "failed_children": 0,
        }

    def killed(self, code: int) -> None:
        self.result["killed"] += code == -signal.SIGKILL
        self.result["failed_children"] += code > 0

    def finished(self, folder: Path, acked: list[list[int]], records: int, expected: str) -> None:
        """`acked` holds the ids that each life of the writer reported; together each id once."""
        every = [i for ids in acked for i in ids]
        self.result["repeated"] += len(every) - len(set(every))
        if fingerprint(folder) != expected:
            self.result["wrong_files"] += 1
            found = {record.record_id for record in open_dataset(folder, allow_missing=True)}
            self.result["lost"] += records - len(found)


def sweep(
    scratch: Path,
    seeds: int = 6,
    stride: int = 1,
    records: int = 11,
    per_part: int = 4,
    before: int = 0,
) -> dict[str, int]:
    """Strike at every `stride`-th step of `seeds` different runs, in three ways, then resume.

    Every third time the resuming process is struck too, at a step that wanders over its whole run.
    The first `before` records are there, as a finished run of their own.
    """
    tally = Tally()
    folder, spare = scratch / "data", scratch / "spare"

    def begin(seed: int) -> list[int]:
        shutil.rmtree(folder, ignore_errors=True)
        with Faults():
            return run(folder, before, per_part, seed) if before else []

    for seed in range(seeds):
        begin(0)
        with Faults() as faults:
            run(folder, records, per_part, seed)
        expected, steps = fingerprint(folder), len(faults.trace)
        assert [record.record_id for record in open_dataset(folder)] == list(range(records))
        for point in (p for p in range(3 * steps) if p // 3 % stride == 0):
            acked = [begin(seed)]
            strikes = [point // 3] + ([point * 7 % steps] if point // 3 % 3 == 0 else [])
            for at in strikes:
                shutil.rmtree(spare, ignore_errors=True)
                spare.mkdir()
                kind = ("before", "torn", "power")[point % 3]

                def work(stored: Stored, kind: str = kind, at: int = at, seed: int = seed) -> None:
                    with Faults(kind, at, spare if kind == "power" else None):
                        run(folder, records, per_part, seed, stored)

                with child(work) as (pid, out):
                    code, ids = reap(pid, out)
                tally.killed(code)
                acked.append(ids)
            with Faults():
                acked.append(run(folder, records, per_part, seed))
            tally.result["points"] += 1
            tally.finished(folder, acked, records, expected)
    return tally.result


def growth(scratch: Path) -> dict[str, int]:
    """A sweep over runs that find a whole part and a short one, of a run of fewer records."""
    return sweep(scratch, seeds=2, before=6)


def unsynced(scratch: Path) -> dict[str, int]:
    """A short sweep of a writer whose journal is not fsynced: it must notice the power cuts."""

    def append(self: journal.Journal, payloads: Iterable[bytes]) -> None:
        data = b"".join(journal._frame(payload) for payload in payloads)
        io.write_all(self._fd, data)
        self.size += len(data)

    journal.Journal.append = append  # type: ignore[method-assign]
    return sweep(scratch, seeds=1, stride=6)


def sigkill(scratch: Path, kills: int = 30, records: int = 300) -> dict[str, int]:
    """SIGKILL a writer (real fsyncs) at random times, over and over until the dataset is whole."""
    tally = Tally()
    folder = scratch / "data"
    rng = random.Random(0)
    run(folder, records, 16, seed=0)
    expected = fingerprint(folder)
    while tally.result["killed"] < kills:
        shutil.rmtree(folder)
        acked: list[list[int]] = []
        code = -1
        while code != 0:
            # 2 ms per batch: several lives per dataset, kills anywhere in it
            work = lambda stored: run(folder, records, 16, 0, stored, pause=0.002)  # noqa: E731
            with child(work) as (pid, out):
                if tally.result["killed"] < kills:
                    time.sleep(rng.uniform(0.0, 0.12))
                    os.kill(pid, signal.SIGKILL)
                code, ids = reap(pid, out)
            tally.killed(code)
            tally.result["points"] += 1
            acked.append(ids)
            if code > 0:
                return tally.result
        tally.finished(folder, acked, records, expected)
    return tally.result


class NoPandas:
    """pyarrow imports pandas where it is installed: memory that every fork would map again."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPandas)
    logging.disable(logging.WARNING)
    gc.disable()  # a collection in a child would copy the parent's pages
    store._COMPACT_BYTES = 64  # so that small runs rewrite their journals too
    place = Path(sys.argv[2])
    modes = {"sweep": sweep, "growth": growth, "unsynced": unsynced, "sigkill": sigkill}
    print(json.dumps(modes[sys.argv[1]](place)))
