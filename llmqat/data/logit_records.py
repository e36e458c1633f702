"""The saved teacher of one generated record: its largest probabilities at every token.

Row t is the teacher's distribution after tokens 0..t of the record (and nothing before it): what
it expects as token t + 1, or after the record. The byte forms are those of `records.py`; in a
part every record is a row group of its own, so that training reads one without its neighbours.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmqat.data.records import RecordForm
from llmqat.errors import DataError

__all__ = ["LOGITS", "LogitRecord", "read_row_group"]

_HEAD = struct.Struct("<qIIB")  # record_id, tokens, k, bytes of a probability
_DIGEST_KEY = b"llmqat.records_sha256"
_FLOATS: dict[int, tuple[Any, pa.DataType]] = {
    2: (np.dtype("<f2"), pa.float16()),
    4: (np.dtype("<f4"), pa.float32()),
}
_BAD_FILE = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


def _schema(probability: pa.DataType) -> pa.Schema:
    columns = {
        "record_id": pa.int64(),
        "length": pa.int32(),
        "top_k": pa.int32(),
        "tokens": _list(pa.int32()),
        "probabilities": _list(probability),
        "rest": _list(pa.float32()),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


@dataclass(frozen=True, eq=False)
class LogitRecord:
    """The k largest probabilities of every token of one record.

    Attributes:
        record_id: the generated record's.
        tokens: int32 [length, k], distinct in a row, most likely first.
        probabilities: float16 or float32 [length, k] of them.
        rest: float32 [length], the probability of all other tokens together, from the teacher's
            own precision.

    Raises:
        DataError: arrays that do not fit each other.
    """

    record_id: int
    tokens: np.ndarray = field(repr=False)
    probabilities: np.ndarray = field(repr=False)
    rest: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        shape, size = self.tokens.shape, self.probabilities.dtype.itemsize
        if (
            len(shape) != 2
            or self.probabilities.shape != shape
            or self.rest.shape != shape[:1]
            or self.probabilities.dtype.kind != "f"
            or size not in _FLOATS
        ):
            raise DataError(
                f"record {self.record_id}: tokens and probabilities must be [length, k] and rest"
                f" [length], got {shape}, {self.probabilities.shape} and {self.rest.shape}"
            )

    @property
    def length(self) -> int:
        """Number of tokens of the record."""
        return int(self.tokens.shape[0])

    @property
    def top_k(self) -> int:
        """Number of probabilities at a token."""
        return int(self.tokens.shape[1])

    @property
    def top_token(self) -> int:
        """The largest token id, -1 for none."""
        return int(self.tokens.max()) if self.tokens.size else -1


def encode_logits(record: LogitRecord) -> bytes:
    """`record` as one journal payload (little endian; layout in docs/data-format.md)."""
    size = record.probabilities.dtype.itemsize
    parts = (
        _HEAD.pack(record.record_id, record.length, record.top_k, size),
        record.tokens.astype("<i4").tobytes(),
        record.probabilities.astype(_FLOATS[size][0]).tobytes(),
        record.rest.astype("<f4").tobytes(),
    )
    return b"".join(parts)


def decode_logits(payload: bytes) -> LogitRecord:
    """Inverse of `encode_logits`; raises `DataError` where the lengths do not add up."""
    if len(payload) < _HEAD.size:
        raise DataError("logits payload is shorter than its head")
    rid, length, top_k, size = _HEAD.unpack_from(payload)
    count = length * top_k
    if size not in _FLOATS or len(payload) != _HEAD.size + count * (4 + size) + 4 * length:
        raise DataError(f"logits of record {rid}: payload length does not match its head")
    at = _HEAD.size
    tokens = np.frombuffer(payload, "<i4", count, at).reshape(length, top_k)
    at += 4 * count
    probabilities = np.frombuffer(payload, _FLOATS[size][0], count, at).reshape(length, top_k)
    return LogitRecord(
        rid, tokens, probabilities, np.frombuffer(payload, "<f4", length, at + size * count)
    )


def _digest(records: Sequence[LogitRecord]) -> bytes:
    total = hashlib.sha256()
    for record in records:
        total.update(encode_logits(record))
    return total.hexdigest().encode()


def encode_logits_part(records: Sequence[LogitRecord]) -> bytes:
    """`records` (sorted by id, one precision) as the bytes of one zstd parquet file, a row group
    for each.
    """
    size = records[0].probabilities.dtype.itemsize
    schema = _schema(_FLOATS[size][1]).with_metadata(
        {b"llmqat.format": b"1", _DIGEST_KEY: _digest(records)}
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=False,
        column_encoding={
            f"{name}.list.element": "BYTE_STREAM_SPLIT"
            for name in ("tokens", "probabilities", "rest")
        },
        write_page_checksum=True,
    ) as writer:
        for record in records:
            columns = [
                pa.array([record.record_id], pa.int64()),
                pa.array([record.length], pa.int32()),
                pa.array([record.top_k], pa.int32()),
                *(
                    pa.ListArray.from_arrays(
                        pa.array([0, values.size], pa.int32()),
                        pa.array(np.ascontiguousarray(values).reshape(-1)),
                        type=schema.field(name).type,
                    )
                    for name, values in (
                        ("tokens", record.tokens.astype(np.int32)),
                        ("probabilities", record.probabilities),
                        ("rest", record.rest.astype(np.float32)),
                    )
                ),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_row_group(file: pq.ParquetFile, index: int) -> LogitRecord:
    """The record in one row group of an opened part; `DataError` if it does not add up."""
    table = file.read_row_group(index, use_threads=False)
    table.validate(full=True)
    if len(table) != 1:
        raise DataError(f"row group {index} has {len(table)} rows, not one")
    row = {name: table.column(name)[0] for name in table.column_names}
    length, top_k = row["length"].as_py(), row["top_k"].as_py()
    arrays = {
        name: row[name].values.to_numpy(zero_copy_only=False)
        for name in ("tokens", "probabilities", "rest")
    }
    return LogitRecord(
        row["record_id"].as_py(),
        arrays["tokens"].reshape(length, top_k),
        arrays["probabilities"].reshape(length, top_k),
        arrays["rest"],
    )


def decode_logits_part(data: bytes, name: str) -> list[LogitRecord]:
    """The records of one part, in file order; `DataError` naming `name` if anything does not add
    up.
    """
    try:
        file = open_logits_part(pa.BufferReader(data))
        records = [read_row_group(file, index) for index in range(file.num_row_groups)]
        if _digest(records) != (file.schema_arrow.metadata or {}).get(_DIGEST_KEY, b""):
            raise DataError("its records do not match their SHA-256")
    except (DataError, *_BAD_FILE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"part {name} is truncated or altered: {reason}") from error
    return records


def open_logits_part(source: Any) -> pq.ParquetFile:
    """A part of saved logits, opened with page checksums; `DataError` for other columns."""
    file = pq.ParquetFile(
        str(source) if isinstance(source, Path) else source, page_checksum_verification=True
    )
    if not any(file.schema_arrow.equals(_schema(kind)) for _, kind in _FLOATS.values()):
        raise DataError("its columns are not those of saved teacher logits")
    return file


LOGITS = RecordForm(
    "llmqat-teacher-logits",
    encode_logits,
    decode_logits,
    encode_logits_part,
    decode_logits_part,
)
"""Saved teacher logits."""
