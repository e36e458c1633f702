"""Packed training sequences: documents in, blocks of exactly `seq_len` token ids out.

Documents are shuffled with a seed, joined (with BOS/EOS between them where asked for) and cut into
blocks, as the paper trains (section 3: concatenated text in blocks of 2048, the tail dropped).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmqat import io
from llmqat.data.reader import open_dataset
from llmqat.errors import ConfigError, DataError

__all__ = ["PackedDataset", "TokenTargets", "read_documents", "read_texts"]

_TEXTS_PER_CALL = 1000  # a fast tokenizer works on a batch with all its threads

StrPath = str | os.PathLike[str]


class TokenTargets(Protocol):
    """Arrays that belong to the tokens of the documents, such as saved teacher logits."""

    @property
    def fingerprint(self) -> str:
        """Changes with any of them."""

    def rows(self, document: int) -> Mapping[str, np.ndarray]:
        """Arrays by name, a row for each token of the document at this position of the input."""


class PackedDataset(Dataset[dict[str, Tensor]]):
    """A map-style dataset of `{"input_ids": int64 [seq_len]}` cut from `documents`.

    Args:
        documents: rows of token ids (lists or integer arrays); empty ones are skipped.
        seq_len: tokens per block.
        seed: shuffles the documents; None keeps their order.
        bos_id, eos_id: put before / after each document that does not begin / end with it; None
            adds nothing.
        drop_tail: drop the last block if it is not full; otherwise it is returned shorter,
            unpadded.
        position_ids: also return "position_ids", int64 [seq_len], which start at 0 in each document
            and block (what attention implementations read document bounds from).
        vocab_size: refuse ids outside 0..vocab_size-1.
        targets: put the rows of every token beside it, under their names.

    Equal arguments give equal blocks, always.

    Raises `ConfigError` for an argument, `DataError` for ids outside the vocabulary or too few
    tokens.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int] | np.ndarray],
        seq_len: int,
        *,
        seed: int | None = 0,
        bos_id: int | None = None,
        eos_id: int | None = None,
        drop_tail: bool = True,
        position_ids: bool = False,
        vocab_size: int | None = None,
        targets: TokenTargets | None = None,
    ) -> None:
        if targets is not None and (bos_id, eos_id) != (None, None):
            raise ConfigError("targets: have no rows for added tokens; leave bos_id and eos_id out")
        if seq_len < 1:
            raise ConfigError(f"seq_len {seq_len}: must be at least 1")
        for name, value in (("bos_id", bos_id), ("eos_id", eos_id)):
            if value is not None and not 0 <= value < (vocab_size or 2**31):
                raise ConfigError(
                    f"{name} {value}: must be a token id below vocab_size {vocab_size}"
                )
        rows, numbers = [], []
        for index, document in enumerate(documents):
            ids = _token_row(document, f"document {index}", vocab_size)
            if ids.size:
                rows.append(_framed(ids, bos_id, eos_id))
                numbers.append(index)
        if seed is not None:
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
            rows, numbers = [rows[i] for i in order], [numbers[i] for i in order]
        self.seq_len = seq_len
        self.documents = len(rows)
        self._with_positions = position_ids
        self._targets = targets
        self._numbers = numbers  # of the documents in the input, in the stream's order
        self._stream = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self._starts = np.cumsum([0] + [row.size for row in rows[:-1]], dtype=np.int64)
        blocks, tail = divmod(self._stream.size, seq_len)
        self._blocks = blocks + (0 if drop_tail or not tail else 1)
        if not self._blocks:
            raise DataError(
                f"{self._stream.size} tokens in {len(rows)} documents are less than one block: "
                f"lower seq_len {seq_len} or give more text"
            )

    @classmethod
    def from_path(
        cls,
        path: StrPath | Sequence[StrPath],
        seq_len: int,
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        allow_missing: bool = False,
        **options: Any,
    ) -> PackedDataset:
        """Pack what `read_documents` finds at `path`; `options` are those of the constructor."""
        documents = read_documents(
            path, tokenizer=tokenizer, vocab_size=vocab_size, allow_missing=allow_missing
        )
        return cls(documents, seq_len, vocab_size=vocab_size, **options)

    @property
    def tokens(self) -> int:
        """Number of tokens that the blocks hold."""
        return min(self._stream.size, self._blocks * self.seq_len)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over block length and tokens in order: a resumed run can check that its data is
        the same.
        """
        head = f"{self.seq_len} {self._blocks} {self._with_positions}\n".encode()
        total = hashlib.sha256(head)
        total.update(self._stream[: self.tokens].astype("<i4").data)
        total.update(self._starts.astype("<i8").data)
        if self._targets is not None:
            total.update(self._targets.fingerprint.encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self._blocks <= index < self._blocks:
            raise IndexError(f"block {index} of {self._blocks}")
        first = index % self._blocks * self.seq_len
        ids = self._stream[first : first + self.seq_len].astype(np.int64)
        item = {"input_ids": torch.from_numpy(ids)}
        if self._with_positions:
            at = np.arange(first, first + ids.size, dtype=np.int64)
            start = self._starts[np.searchsorted(self._starts, at, side="right") - 1]
            item["position_ids"] = torch.from_numpy(at - np.maximum(start, first))
        if self._targets is not None:
            item.update(self._target_rows(self._targets, first, first + ids.size))
        return item

    def _target_rows(self, targets: TokenTargets, first: int, stop: int) -> dict[str, Tensor]:
        """The targets of the stream's tokens first..stop-1; integers as int64."""
        pieces: dict[str, list[np.ndarray]] = {}
        at = int(np.searchsorted(self._starts, first, side="right")) - 1
        while at < self.documents and self._starts[at] < stop:
            start = int(self._starts[at])
            end = self._starts[at + 1] if at + 1 < self.documents else self._stream.size
            for name, rows in targets.rows(self._numbers[at]).items():
                if len(rows) != end - start:
                    raise DataError(
                        f"document {self._numbers[at]}: {end - start} tokens but {len(rows)} rows"
                        f" of {name}"
                    )
                pieces.setdefault(name, []).append(rows[max(first - start, 0) : stop - start])
            at += 1
        joined = {name: np.concatenate(rows) for name, rows in pieces.items()}
        return {
            name: torch.from_numpy(rows.astype(np.int64) if rows.dtype.kind == "i" else rows)
            for name, rows in joined.items()
        }


def _framed(ids: np.ndarray, bos_id: int | None, eos_id: int | None) -> np.ndarray:
    """`ids` with BOS before and EOS after it, unless it has them."""
    head = [] if bos_id is None or ids[0] == bos_id else [bos_id]
    tail = [] if eos_id is None or ids[-1] == eos_id else [eos_id]
    if not head and not tail:
        return ids
    return np.concatenate([np.array(head, np.int32), ids, np.array(tail, np.int32)])


def _token_row(values: Any, where: str, vocab_size: int | None) -> np.ndarray:
    """`values` as int32 [n], checked against the vocabulary."""
    try:
        ids = np.asarray(values)
    except (ValueError, TypeError) as error:  # ragged or foreign content
        raise DataError(f"{where}: input_ids must be one row of integers") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise DataError(
            f"{where}: input_ids must be one row of integers, got {ids.dtype} {list(ids.shape)}"
        )
    if ids.size:
        limit = vocab_size if vocab_size is not None else 2**31
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            bad = low if low < 0 else high
            raise DataError(f"{where}: token {bad} is outside vocab_size {limit}")
    return ids.astype(np.int32, copy=False)


def read_documents(
    path: StrPath | Sequence[StrPath],
    *,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    allow_missing: bool = False,
) -> Iterator[np.ndarray]:
    """Yield each document at `path` (or at several) as int32 token ids [n].

    A folder is one of generated records (`open_dataset`; `allow_missing` goes there). A `.txt` file
    is one document; a `.jsonl` line or a `.parquet` row is one, from its "input_ids" or else its
    "text". Text needs a `tokenizer` (Hugging Face's, or a `tokenizers.Tokenizer`), which adds no
    special tokens here. Raises `DataError` naming file and row for anything truncated, altered or
    outside `vocab_size`.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ConfigError("path: give at least one file or folder")
    for each in map(Path, paths):
        if each.is_dir():
            for record in open_dataset(each, allow_missing=allow_missing):
                where = f"{each} record {record.record_id}"
                yield _token_row(record.input_ids, where, vocab_size)
        else:
            yield from _file_documents(each, tokenizer, vocab_size)


def read_texts(path: StrPath) -> Iterator[str]:
    """Yield each text document of a file: a `.jsonl` line or `.parquet` row with a "text", or the
    whole of any other file as UTF-8. Raises `DataError` naming file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no text file at {path}")
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix, _read_txt)
    try:
        for where, value in reader(path):
            if not isinstance(value, str):
                raise DataError(f"{where} holds token ids, not text")
            yield value
    except OSError as error:
        raise io.error_at(error, path, "cannot read") from error


def _file_documents(path: Path, tokenizer: Any, vocab_size: int | None) -> Iterator[np.ndarray]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"data file {path}: expected a folder, .txt, .jsonl or .parquet")
    if not path.is_file():
        raise DataError(f"data file {path} does not exist")
    texts: list[tuple[str, str]] = []  # (where, text) that wait for one tokenizer call
    try:
        for where, value in readers[path.suffix](path):
            if not isinstance(value, str):
                yield from _tokenized(texts, tokenizer, vocab_size)
                texts = []
                yield _token_row(value, where, vocab_size)
                continue
            texts.append((where, value))
            if len(texts) == _TEXTS_PER_CALL:
                yield from _tokenized(texts, tokenizer, vocab_size)
                texts = []
    except OSError as error:
        raise io.error_at(error, path, "cannot read") from error
    yield from _tokenized(texts, tokenizer, vocab_size)


def _tokenized(
    texts: list[tuple[str, str]], tokenizer: Any, vocab_size: int | None
) -> Iterator[np.ndarray]:
    if not texts:
        return
    if tokenizer is None:
        raise ConfigError(f"{texts[0][0]} is text: give a tokenizer")
    batch = [text for _, text in texts]
    if hasattr(tokenizer, "encode_batch"):
        rows = [row.ids for row in tokenizer.encode_batch(batch, add_special_tokens=False)]
    else:
        # verbose=False: a text longer than the model's window is no mistake here, it is cut into
        # blocks.
        rows = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    for (where, _), row in zip(texts, rows, strict=True):
        yield _token_row(row, where, vocab_size)


def _read_txt(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {path} is not UTF-8: {error.reason} at {error.start}"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            value = _tokens_or_text(row) if isinstance(row, dict) else None
            if value is None:
                raise DataError(f'{where} has neither "input_ids" (a list) nor "text" (a string)')
            yield where, value


def _tokens_or_text(row: dict[str, Any]) -> Any:
    ids, text = row.get("input_ids"), row.get("text")
    if isinstance(ids, list):
        return ids
    return text if isinstance(text, str) else None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            column, is_tokens = _column(file.schema_arrow)
            for batch in file.iter_batches(columns=[column], use_threads=False):
                batch.validate(full=True)
                for cell in batch.column(0):
                    values = cell.values if is_tokens else None
                    if not cell.is_valid or (values is not None and values.null_count):
                        raise DataError(f"row {number}: {column} is empty or has empty entries")
                    value = (
                        cell.as_py() if values is None else values.to_numpy(zero_copy_only=False)
                    )
                    yield f"{path} row {number}", value
                    number += 1
    except DataError as error:
        raise DataError(f"data file {path}: {error}") from error
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data file {path} is truncated or altered: {reason}") from error


def _column(schema: pa.Schema) -> tuple[str, bool]:
    """The column to read, and whether it holds token ids (else text)."""
    for name in ("input_ids", "text"):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if name == "input_ids":
            if any(is_list(kind) for is_list in lists) and pa.types.is_integer(kind.value_type):
                return name, True
            raise DataError(f"input_ids must be a list of integers, not {kind}")
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return name, False
        raise DataError(f"text must be a string, not {kind}")
    raise DataError('it has neither an "input_ids" nor a "text" column')
