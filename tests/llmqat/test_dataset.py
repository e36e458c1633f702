"""llmqat/data/dataset.py: documents in, blocks out, nothing lost between."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from llmqat.data import Record, RecordWriter, open_dataset
from llmqat.data.dataset import PackedDataset, read_documents
from llmqat.errors import ConfigError, DataError

VOCAB = {word: index for index, word in enumerate(["<unk>", "the", "cat", "sat", "down"])}
TEXTS = ["the cat", "cat sat down", "", "down down the", "zebra"]
IDS = [[1, 2], [2, 3, 4], [], [4, 4, 1], [0]]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def blocks(data: PackedDataset) -> list[list[int]]:
    return [data[i]["input_ids"].tolist() for i in range(len(data))]


def flat(data: PackedDataset) -> list[int]:
    return [token for block in blocks(data) for token in block]


def rows(path: Any, **options: Any) -> list[list[int]]:
    return [row.tolist() for row in read_documents(path, **options)]


# Packing


def test_packing_by_hand() -> None:
    documents = [[1, 2, 3], [], [4, 5], [6, 7, 8, 9, 10]]
    data = PackedDataset(documents, 4, seed=None, position_ids=True)
    assert blocks(data) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [data[i]["position_ids"].tolist() for i in range(2)] == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert (len(data), data.tokens, data.documents) == (2, 8, 3)
    assert data[-1]["input_ids"].tolist() == [5, 6, 7, 8]
    assert {value.dtype for value in data[0].values()} == {torch.int64}
    for index in (2, -3):
        with pytest.raises(IndexError):
            data[index]

    kept = PackedDataset(documents, 4, seed=None, drop_tail=False, position_ids=True)
    assert blocks(kept) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]] and kept.tokens == 10
    assert kept[2]["position_ids"].tolist() == [0, 1]
    exact = PackedDataset([[1, 2], [3, 4]], 2, seed=None, drop_tail=False)
    assert blocks(exact) == [[1, 2], [3, 4]] and "position_ids" not in exact[0]


def test_bos_and_eos_are_not_doubled() -> None:
    documents = [[5, 6], [1, 7], [8, 2], [1, 2], []]
    both = PackedDataset(documents, 1, seed=None, bos_id=1, eos_id=2)
    assert [row[0] for row in blocks(both)] == [1, 5, 6, 2, 1, 7, 2, 1, 8, 2, 1, 2]
    only = PackedDataset(documents, 1, seed=None, eos_id=2)
    assert [row[0] for row in blocks(only)] == [5, 6, 2, 1, 7, 2, 8, 2, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=12),
    seq_len=st.integers(1, 8),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    drop=st.booleans(),
)
def test_every_token_once(
    documents: list[list[int]], seq_len: int, seed: int | None, drop: bool
) -> None:
    total = sum(map(len, documents))
    if total < (seq_len if drop else 1):
        with pytest.raises(DataError, match="seq_len"):
            PackedDataset(documents, seq_len, seed=seed, drop_tail=drop)
        return
    data = PackedDataset(documents, seq_len, seed=seed, drop_tail=drop, position_ids=True)
    stream = flat(data)
    assert len(stream) == data.tokens == (total - total % seq_len if drop else total)
    full = [row for row in documents if row]
    if seed is not None:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(full))
        full = [full[i] for i in order]
    assert stream == [token for row in full for token in row][: len(stream)]
    inside = [i for row in full for i in range(len(row))][: len(stream)]
    positions = [p for i in range(len(data)) for p in data[i]["position_ids"].tolist()]
    expected = [min(at % seq_len, place) for at, place in enumerate(inside)]
    assert positions == expected


def test_seed_decides_the_order() -> None:
    documents = [[i] for i in range(50)]
    one, again, other = (PackedDataset(documents, 10, seed=seed) for seed in (1, 1, 2))
    assert blocks(one) == blocks(again) and one.fingerprint == again.fingerprint
    assert blocks(one) != blocks(other) and one.fingerprint != other.fingerprint
    assert one.fingerprint != PackedDataset(documents, 5, seed=1).fingerprint
    assert sorted(flat(one)) == list(range(50))


def test_items_are_copies() -> None:
    data = PackedDataset([[1, 2, 3, 4]], 2)
    data[0]["input_ids"].zero_()
    assert blocks(data) == [[1, 2], [3, 4]]


def test_in_a_data_loader() -> None:
    data = PackedDataset([list(range(40))], 5, position_ids=True)
    assert blocks(pickle.loads(pickle.dumps(data))) == blocks(data)
    batches = list(DataLoader(data, batch_size=4))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 5), (4, 5)]
    assert torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist() == list(
        range(40)
    )


@pytest.mark.parametrize(
    ("documents", "options", "kind", "words"),
    [
        ([[1]], {"seq_len": 0}, ConfigError, "seq_len"),
        ([[1]], {"seq_len": 1, "bos_id": -1}, ConfigError, "bos_id"),
        ([[1]], {"seq_len": 1, "eos_id": 9, "vocab_size": 9}, ConfigError, "eos_id"),
        ([[1], [3, 9]], {"seq_len": 1, "vocab_size": 9}, DataError, "document 1: token 9"),
        ([[1], [-1]], {"seq_len": 1}, DataError, "document 1: token -1"),
        ([[2**31]], {"seq_len": 1}, DataError, "token 2147483648"),
        ([[1.5]], {"seq_len": 1}, DataError, "integers"),
        ([[[1]]], {"seq_len": 1}, DataError, "one row"),
        ([[[1], 2]], {"seq_len": 1}, DataError, "one row"),
        ([["a"]], {"seq_len": 1}, DataError, "integers"),
        ([], {"seq_len": 1}, DataError, "0 tokens in 0 documents"),
    ],
)
def test_bad_arguments(documents: Any, options: dict[str, Any], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        PackedDataset(documents, **options)
    assert "\n" not in str(caught.value)


# Sources


def test_generated_records(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [Record(i, rng.integers(0, 100, 7)) for i in range(20)]
    with RecordWriter(tmp_path, {"seed": 1}, records=20, records_per_part=6) as out:
        out.write(records[:13])
    with pytest.raises(DataError, match="first 12"):
        PackedDataset.from_path(tmp_path, 10)
    part = PackedDataset.from_path(tmp_path, 10, seed=None, allow_missing=True)
    assert flat(part) == [t for r in records[:12] for t in r.input_ids.tolist()][:80]
    with RecordWriter(tmp_path, {"seed": 1}, records=20, records_per_part=6) as out:
        out.write(records[13:])
    whole = PackedDataset.from_path(tmp_path, 10, seed=None, vocab_size=100)
    assert flat(whole) == [t for r in records for t in r.input_ids.tolist()]
    with pytest.raises(DataError, match=f"{tmp_path} record"):
        PackedDataset.from_path(tmp_path, 10, vocab_size=50)
    # the parts are plain parquet too
    assert rows(sorted((tmp_path / "parts").iterdir())) == [r.input_ids.tolist() for r in records]


@pytest.mark.parametrize("kind", ["tokenizers", "transformers"])
def test_text_files(tmp_path: Path, kind: str) -> None:
    tokenizer: Any = word_tokenizer()
    if kind == "transformers":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=2
        )
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps({"id": 1, "text": t}) for t in TEXTS))
    pq.write_table(pa.table({"text": TEXTS, "other": range(5)}), tmp_path / "c.parquet")
    joined = [token for row in IDS for token in row]
    assert rows(tmp_path / "a.txt", tokenizer=tokenizer) == [joined]
    assert rows(str(tmp_path / "b.jsonl"), tokenizer=tokenizer) == IDS
    assert rows(tmp_path / "c.parquet", tokenizer=tokenizer, vocab_size=5) == IDS
    several = PackedDataset.from_path(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"],
        3,
        tokenizer=tokenizer,
        seed=None,
        drop_tail=False,
    )
    assert flat(several) == joined * 2
    with pytest.raises(DataError, match=r"c\.parquet row 1: token 4"):
        rows(tmp_path / "c.parquet", tokenizer=tokenizer, vocab_size=4)
    with pytest.raises(ConfigError, match="tokenizer"):
        rows(tmp_path / "a.txt")


def test_many_texts_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {"input_ids": [2]} if i % 700 == 5 else {"text": "cat " * (i % 3 + 1)} for i in range(2500)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    expected = [row.get("input_ids") or [2] * row["text"].count("cat") for row in lines]
    assert rows(path, tokenizer=word_tokenizer()) == expected


def test_token_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"input_ids": [1, 2], "text": "unused"}\n{"input_ids": []}\n'
    )
    assert rows(tmp_path / "a.jsonl") == [[1, 2], []]
    for number, kind in enumerate(
        (pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int32(), 2))
    ):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"input_ids": pa.array([[1, 2], [3, 4]], kind)}), path)
        assert rows(path) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"ab\xff", "UTF-8"),
        ("a.jsonl", b'{"text": "the"}\n{"text": "th', "line 2"),
        ("a.jsonl", b'{"other": 1}', "line 1"),
        ("a.jsonl", b"[1, 2]", "line 1"),
        ("a.jsonl", b'{"input_ids": [1, "x"]}', "line 1"),
        ("a.jsonl", b'{"input_ids": [1, -2]}', "line 1"),
        ("a.jsonl", b"\xff\xfe", "line 1"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.parquet", b"", "truncated"),
        ("a.parquet", b"PAR1 nonsense PAR1", "truncated"),
        ("a.csv", b"text", "expected"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        rows(path, tokenizer=word_tokenizer())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "column",
    [
        {"ids": [[1]]},
        {"input_ids": [1, 2]},
        {"input_ids": [["a"]]},
        {"input_ids": [[1.5]]},
        {"input_ids": [[1], None]},
        {"input_ids": [[1, None]]},
        {"text": [1, 2]},
        {"text": ["the", None]},
    ],
)
def test_bad_columns(tmp_path: Path, column: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(column), path)
    with pytest.raises(DataError, match=r"a\.parquet") as caught:
        rows(path, tokenizer=word_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder_of_records(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(DataError, match=r"text\.txt is a file; name a folder"):
        open_dataset(tmp_path / "text.txt")


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        rows(tmp_path / "none.txt")
    with pytest.raises(DataError, match="expected"):
        rows(tmp_path / "none")
    with pytest.raises(DataError, match=r"manifest\.json"):
        rows(tmp_path)
    with pytest.raises(ConfigError, match="path"):
        rows([])


def test_mutated_parquet(tmp_path: Path) -> None:
    """Any cut is an error naming the file; a flip is one too, or is read as some rows, never a
    crash.
    """
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    table = pa.table({"input_ids": [[rng.randrange(100) for _ in range(20)] for _ in range(50)]})
    pq.write_table(table, path, write_page_checksum=True)
    data = path.read_bytes()
    refused = 0
    for turn in range(500):
        changed = bytearray(data)
        if turn < 100:
            del changed[turn * len(data) // 100 :]
        else:
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            list(read_documents(path, vocab_size=100))
            assert turn >= 100
        except DataError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 250


class _Targets:
    """One row for each token, or for one less."""

    fingerprint = "x"

    def __init__(self, lengths, short=0):
        self.lengths, self.short = lengths, short

    def rows(self, document):
        count = self.lengths[document] - self.short
        return {"target": np.arange(count, dtype=np.int32)[:, None] + 100 * document}


def test_targets_stand_beside_their_tokens():
    """Token t of document d is 100 d + t here, and so is its target; empty documents have none."""
    lengths = [5, 0, 9, 1, 6]
    documents = [100 * d + np.arange(n) for d, n in enumerate(lengths)]
    dataset = PackedDataset(documents, 4, seed=2, targets=_Targets(lengths), drop_tail=False)
    for item in dataset:
        assert item["target"].dtype == torch.int64
        assert torch.equal(item["target"][:, 0], item["input_ids"])
    with pytest.raises(DataError, match=r"document \d: \d tokens but \d rows of target"):
        PackedDataset(documents, 4, targets=_Targets(lengths, short=1))[0]
