"""Saved teacher logits: written once beside the generated records, read by training instead of a
teacher.

They lie in `DATA/teacher-logits/`, a folder of the same kind as DATA itself (manifest, parts,
journal; the parts hold the same record ids). The manifest's config holds the SHA-256 of the
teacher and of the records: a folder of others is refused, both for writing on and for training.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llmqat import io
from llmqat.data.logit_records import LOGITS, LogitRecord, open_logits_part, read_row_group
from llmqat.data.manifest import PartEntry
from llmqat.data.reader import RecordDataset, open_dataset, open_parts
from llmqat.data.records import Record
from llmqat.data.store import RecordWriter
from llmqat.errors import ConfigError, DataError
from llmqat.models.heads import last_hidden, plain_head

__all__ = ["FOLDER", "PRECISIONS", "LogitSummary", "TeacherLogits", "fill_logits", "logit_writer"]

FOLDER = "teacher-logits"
PRECISIONS = {"float16": torch.float16, "float32": torch.float32}
_OPEN_PARTS = 32
"""Parts whose footers stay in memory."""


def logit_writer(
    dataset: RecordDataset,
    teacher_sha256: str,
    vocab_size: int,
    *,
    top_k: int,
    precision: str,
    dtype: str,
    shard: str = "0/1",
    versions: dict[str, Any] | None = None,
) -> RecordWriter:
    """Open the folder of `dataset`'s logits for writing; what is stored there already stays.

    Raises:
        ConfigError: a value out of range, or another process writes this shard. DataError: the
        folder holds logits of another teacher, other records or other settings.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision: {precision!r} is not supported; use {' or '.join(PRECISIONS)}"
        )
    if not 1 <= top_k <= vocab_size:
        raise ConfigError(f"top_k: {top_k} must be 1..{vocab_size}, the vocabulary")
    config = {
        "teacher_sha256": teacher_sha256,
        "data_sha256": dataset.fingerprint,
        "vocab_size": vocab_size,
        "top_k": top_k,
        "precision": precision,
        "dtype": dtype,
        "versions": versions or {},
    }
    first = dataset.first_record
    return RecordWriter(
        dataset.folder / FOLDER,
        config,
        records=range(first, first + len(dataset)),
        shard=shard,
        records_per_part=dataset.records_per_part,
        form=LOGITS,
    )


@dataclass(frozen=True)
class LogitSummary:
    """What one call of :func:`fill_logits` did. `rest` is the mean probability outside the top k
    of the tokens written, 0 for none.
    """

    records: int
    tokens: int
    rest: float
    seconds: float


@torch.inference_mode()
def fill_logits(
    writer: RecordWriter,
    dataset: RecordDataset,
    teacher: nn.Module,
    *,
    top_k: int,
    precision: str = "float16",
    batch_size: int = 4,
    chunk_size: int = 1024,
    progress: bool = True,
) -> LogitSummary:
    """Write every record that `writer` misses. What it has stored survives any kill.

    Batches are cut from whole parts by record id, never from what is missing: a batch that a kill
    tore apart is computed again as it was, so that the same options give the same bytes.

    Args:
        teacher: a plain causal model in eval mode, on its device.
        batch_size: records that are computed together.
        chunk_size: tokens whose logits exist at one time.

    Raises:
        ConfigError: a value out of range, or a model without plain head. DataError: damaged
        records, or a teacher whose logits are not finite.
    """
    for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value < 1:
            raise ConfigError(f"{name}: {value} must be at least 1")
    plain_head("teacher", teacher)
    missing, begin = set(writer.missing()), time.perf_counter()
    records = tokens = 0
    rest = 0.0
    with tqdm(
        total=writer.total,
        initial=writer.stored,
        unit="record",
        desc="teacher-logits",
        disable=not progress,
    ) as bar:
        for batch in _batches(dataset, missing, batch_size):
            rows = _top_k_rows(teacher, batch, top_k, chunk_size, PRECISIONS[precision])
            new = [row for row in rows if row.record_id in missing]
            writer.write(new)
            records += len(new)
            tokens += sum(row.length for row in new)
            rest += sum(float(row.rest.sum(dtype=np.float64)) for row in new)
            bar.update(len(new))
    seconds = time.perf_counter() - begin
    return LogitSummary(records, tokens, rest / max(tokens, 1), seconds)


def _batches(dataset: RecordDataset, missing: set[int], size: int) -> Iterator[list[Record]]:
    for part in dataset.parts:
        ids = range(part.first, part.last + 1)
        groups = [ids[at : at + size] for at in range(0, len(ids), size)]
        wanted = [group for group in groups if not missing.isdisjoint(group)]
        if wanted:
            records = dataset.read_part(part)
            for group in wanted:
                yield [records[record_id - part.first] for record_id in group]


def _top_k_rows(
    teacher: nn.Module,
    batch: Sequence[Record],
    top_k: int,
    chunk_size: int,
    precision: torch.dtype,
) -> list[LogitRecord]:
    """Compute records together, each in its own context: padding stands after it, where a causal
    model does not see it.
    """
    head = plain_head("teacher", teacher)
    lengths = [record.length for record in batch]
    ids = torch.zeros((len(batch), max(1, *lengths)), dtype=torch.int64)
    for row, record in zip(ids, batch, strict=True):
        if record.top_token >= head.weight.shape[0]:
            raise DataError(
                f"record {record.record_id}: token {record.top_token} is outside the teacher's"
                f" vocabulary of {head.weight.shape[0]}"
            )
        row[: record.length] = torch.from_numpy(record.input_ids.astype(np.int64))
    hidden = last_hidden(teacher, {"input_ids": ids.to(head.weight.device)})
    rows = []
    for record, states in zip(batch, hidden, strict=True):
        chunks = [
            _top_k_of(F.linear(chunk.to(head.weight.dtype), head.weight), top_k, precision)
            for chunk in states[: record.length].split(chunk_size)
        ]
        tokens, probabilities, rest = (
            torch.cat(parts).numpy() for parts in zip(*chunks, strict=True)
        )
        if not np.isfinite(rest).all():
            raise DataError(
                f"record {record.record_id}: the teacher's logits are not finite; use another"
                " --dtype"
            )
        rows.append(LogitRecord(record.record_id, tokens, probabilities, rest))
    return rows


def _top_k_of(logits: Tensor, top_k: int, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The largest probabilities of logits [n, V], on the CPU: int32 [n, k], `precision` [n, k],
    fp32 [n].
    """
    probabilities, tokens = torch.softmax(logits.float(), -1).topk(top_k, -1)
    rest = (1 - probabilities.sum(-1, dtype=torch.float64)).clamp(min=0).float()
    return tokens.int().cpu(), probabilities.to(precision).cpu(), rest.cpu()


class TeacherLogits:
    """The saved logits of the records in `folder`, read record by record: what `PackedDataset`
    takes as `targets`.

    `config` is the manifest's (`teacher_sha256`, `data_sha256`, `vocab_size`, `top_k`, ...).

    Raises:
        DataError: there are none, they are unfinished, or they belong to other records.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        data = Path(folder)
        self.folder = data / FOLDER
        if not self.folder.is_dir():
            raise DataError(f"{data} has no saved teacher logits; run llmqat teacher-logits first")
        records = open_dataset(data)
        manifest, self._parts = open_parts(self.folder, False, LOGITS.format)
        self.config = manifest.config
        if manifest.config.get("data_sha256") != records.fingerprint or (
            (manifest.first_record, manifest.records) != (records.first_record, len(records))
        ):
            raise DataError(
                f"{self.folder} was written for other records; remove it and run llmqat"
                " teacher-logits again"
            )
        self._first, self._per_part = manifest.first_record, manifest.records_per_part
        self._verified: set[int] = set()
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def check(self, vocab_size: int, teacher_sha256: str | None) -> None:
        """DataError unless these suit a student of `vocab_size`, and come from the teacher whose
        digest is given.
        """
        vocab = self.config.get("vocab_size")
        if vocab != vocab_size:
            raise DataError(
                f"{self.folder}: its teacher has a vocabulary of {vocab}, the student of"
                f" {vocab_size}; they must be equal"
            )
        if teacher_sha256 is not None and teacher_sha256 != self.config.get("teacher_sha256"):
            raise DataError(
                f"{self.folder} was written by another teacher; name that one, or remove the folder"
                " and run llmqat teacher-logits again"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all parts."""
        digests = "\n".join(part.sha256 for part in self._parts)
        return hashlib.sha256(digests.encode()).hexdigest()

    def rows(self, document: int) -> dict[str, np.ndarray]:
        """The record at position `document` of the data: int32 and float [length, k] by the keys
        that a training item has.

        Raises:
            DataError: a damaged part.
        """
        block, index = divmod(document, self._per_part)
        part = self._parts[block]
        try:
            record = read_row_group(self._file(block), index)
        except (DataError, pa.ArrowException, OSError, ValueError) as error:
            path = self.folder / "parts" / part.name
            raise DataError(f"part {path} is truncated or altered: {error}") from error
        if record.record_id != self._first + document:
            raise DataError(f"part {part.name}: row group {index} is record {record.record_id}")
        return {"teacher_tokens": record.tokens, "teacher_probabilities": record.probabilities}

    def _file(self, block: int) -> pq.ParquetFile:
        file = self._open.pop(block, None)
        if file is None:
            path = self.folder / "parts" / self._parts[block].name
            self._verify(block, path, self._parts[block])
            file = open_logits_part(path)
        self._open[block] = file
        if len(self._open) > _OPEN_PARTS:
            self._open.popitem(last=False)[1].close()
        return file

    def _verify(self, block: int, path: Path, part: PartEntry) -> None:
        if block not in self._verified:
            if io.sha256_file(path) != part.sha256:
                raise DataError("it does not match the SHA-256 in its manifest")
            self._verified.add(block)
