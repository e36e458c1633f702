"""One generated record, and the two byte forms of it: a row of a parquet part and a journal
payload.

Both are functions of the records alone: no time, no host, no order of arrival.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmqat.errors import DataError

__all__ = [
    "TOKENS",
    "Record",
    "RecordForm",
    "Stored",
    "decode_part",
    "decode_record",
    "encode_part",
    "encode_record",
]

_INT32_MAX = 2**31 - 1
_HEAD = struct.Struct(
    "<qiiIHH"
)  # record_id, seed_token, n_greedy, tokens, bytes of the two strings
_DIGEST_KEY = b"llmqat.records_sha256"

SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.int64(), nullable=False),
        pa.field(
            "input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False
        ),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("seed_token", pa.int32(), nullable=False),
        pa.field("n_greedy", pa.int32(), nullable=False),
        pa.field("strategy", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class Record:
    """One sequence that the teacher wrote.

    `record_id` >= 0 decides the record's randomness; `input_ids` are all its token ids, int32
    [length] (any sequence of integers is taken: list, numpy array, CPU tensor); `seed_token` is the
    first token that was drawn or enumerated, -1 for none; `n_greedy` counts the top-1 tokens after
    it; `strategy` names how it was made and `finish_reason` why it ended ("eos", "length", ...).
    Raises `DataError`.
    """

    record_id: int
    input_ids: Any = field(repr=False)
    seed_token: int = -1
    n_greedy: int = 0
    strategy: str = ""
    finish_reason: str = ""

    def __post_init__(self) -> None:
        rid = int(self.record_id)
        if not 0 <= rid < 2**63:
            raise DataError(f"record_id {rid}: must lie in 0..2^63-1")
        ids = np.asarray(self.input_ids)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise DataError(
                f"record {rid}: input_ids must be one row of integers, "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) > _INT32_MAX):
            raise DataError(f"record {rid}: input_ids must lie in 0..2^31-1")
        for name in ("seed_token", "n_greedy"):
            value = int(getattr(self, name))
            if not -1 <= value <= _INT32_MAX:
                raise DataError(f"record {rid}: {name} {value} must lie in -1..2^31-1")
            object.__setattr__(self, name, value)
        for name in ("strategy", "finish_reason"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text.encode()) > 0xFFFF:
                raise DataError(f"record {rid}: {name} must be a string of at most 65535 bytes")
        ids = ids.astype(np.int32)  # a copy, so that a caller's buffer may be used again
        ids.flags.writeable = False
        object.__setattr__(self, "record_id", rid)
        object.__setattr__(self, "input_ids", ids)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.input_ids.size)

    @property
    def top_token(self) -> int:
        """The largest token id, -1 for none."""
        return int(self.input_ids.max()) if self.length else -1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and encode_record(self) == encode_record(other)

    def __hash__(self) -> int:
        return hash(encode_record(self))


def encode_record(record: Record) -> bytes:
    """`record` as one journal payload (little endian; layout in docs/data-format.md)."""
    strategy, reason = record.strategy.encode(), record.finish_reason.encode()
    head = _HEAD.pack(
        record.record_id,
        record.seed_token,
        record.n_greedy,
        record.length,
        len(strategy),
        len(reason),
    )
    ids: bytes = record.input_ids.astype("<i4").tobytes()
    return head + strategy + reason + ids


def decode_record(payload: bytes) -> Record:
    """Inverse of `encode_record`; raises `DataError` where the lengths do not add up."""
    if len(payload) < _HEAD.size:
        raise DataError("record payload is shorter than its head")
    rid, seed, greedy, tokens, n_strategy, n_reason = _HEAD.unpack_from(payload)
    a = _HEAD.size
    b = a + n_strategy
    c = b + n_reason
    if len(payload) != c + 4 * tokens:
        raise DataError(f"record {rid}: payload length does not match its head")
    ids = np.frombuffer(payload, "<i4", tokens, c)
    return Record(rid, ids, seed, greedy, payload[a:b].decode(), payload[b:c].decode())


def _digest(records: Sequence[Record]) -> bytes:
    total = hashlib.sha256()
    for record in records:
        total.update(encode_record(record))
    return total.hexdigest().encode()


def encode_part(records: Sequence[Record]) -> bytes:
    """`records` (sorted by id) as the bytes of one zstd parquet file with a single row group.

    The file carries the SHA-256 of its records, so that a part proves itself without a manifest.
    The bytes depend on the records and on the version of pyarrow (which a parquet footer names).
    """
    lengths = np.array([r.length for r in records], np.int32)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int64)])
    if offsets[-1] > _INT32_MAX:
        raise DataError(f"a part of {offsets[-1]} tokens exceeds 2^31-1: lower records_per_part")
    values = np.concatenate([r.input_ids for r in records]) if records else np.zeros(0, np.int32)
    columns = [
        pa.array([r.record_id for r in records], pa.int64()),
        pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)),
            pa.array(values),
            type=SCHEMA.field("input_ids").type,
        ),
        pa.array(lengths),
        pa.array([r.seed_token for r in records], pa.int32()),
        pa.array([r.n_greedy for r in records], pa.int32()),
        pa.array([r.strategy for r in records], pa.string()),
        pa.array([r.finish_reason for r in records], pa.string()),
    ]
    schema = SCHEMA.with_metadata({b"llmqat.format": b"1", _DIGEST_KEY: _digest(records)})
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=max(1, len(records)),
        compression="zstd",
        # Token ids below 2^16 have two constant byte planes: split planes take 2.0 bytes a token on
        # uniform ids of a 49k vocabulary, where the plain encoding takes 2.5.
        use_dictionary=["strategy", "finish_reason"],
        column_encoding={"input_ids.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode_part(data: bytes, name: str) -> list[Record]:
    """The records of one part, in file order; `DataError` naming `name` if anything does not add
    up.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if not file.schema_arrow.equals(SCHEMA):
            raise DataError("its columns are not those of a record part")
        digest = (file.schema_arrow.metadata or {}).get(_DIGEST_KEY, b"")
        table = file.read(use_threads=False)
        table.validate(full=True)
        ids = table.column("input_ids").combine_chunks()
        values = ids.values.to_numpy(zero_copy_only=False)
        bounds = ids.offsets.to_numpy()
        plain = table.drop_columns(["input_ids"]).to_pylist()
        records = [
            Record(
                row["record_id"],
                values[bounds[i] : bounds[i + 1]],
                row["seed_token"],
                row["n_greedy"],
                row["strategy"],
                row["finish_reason"],
            )
            for i, row in enumerate(plain)
        ]
        if any(record.length != row["length"] for record, row in zip(records, plain, strict=True)):
            raise DataError("a length column differs from its tokens")
        if _digest(records) != digest:
            raise DataError("its records do not match their SHA-256")
    except DataError as error:
        raise DataError(f"part {name} is truncated or altered: {error}") from error
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"part {name} is truncated or altered: {reason}") from error
    return records


class Stored(Protocol):
    """What the store needs of a record of any form."""

    @property
    def record_id(self) -> int:
        """Which record it is, or belongs to."""

    @property
    def length(self) -> int:
        """Number of tokens that it is about."""

    @property
    def top_token(self) -> int:
        """The largest token id in it, -1 for none."""


@dataclass(frozen=True)
class RecordForm:
    """One kind of stored record: its name in manifests, and its two byte forms, which must be
    functions of the records alone.
    """

    format: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Stored]
    encode_part: Callable[[Sequence[Any]], bytes]
    decode_part: Callable[[bytes, str], Sequence[Stored]]


TOKENS = RecordForm("llmqat-records", encode_record, decode_record, encode_part, decode_part)
"""Generated records."""
