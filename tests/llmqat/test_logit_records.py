"""The byte forms of saved teacher logits."""

import numpy as np
import pytest

from llmqat.data.logit_records import (
    LOGITS,
    LogitRecord,
    decode_logits,
    encode_logits,
    open_logits_part,
    read_row_group,
)
from llmqat.errors import DataError


def record(rid=0, length=5, top_k=3, dtype=np.float16):
    generator = np.random.default_rng(rid)
    tokens = np.stack([generator.permutation(50)[:top_k] for _ in range(length)]) if length else []
    return LogitRecord(
        rid,
        np.asarray(tokens, np.int32).reshape(length, top_k),
        generator.random((length, top_k)).astype(dtype),
        generator.random(length).astype(np.float32),
    )


def assert_equal(a, b):
    assert (a.record_id, a.length, a.top_k) == (b.record_id, b.length, b.top_k)
    for name in ("tokens", "probabilities", "rest"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("length", [0, 1, 7])
def test_both_forms_round_trip(dtype, length, tmp_path):
    records = [record(rid, length, dtype=dtype) for rid in (3, 4, 5)]
    for each in records:
        assert_equal(decode_logits(encode_logits(each)), each)
    data = LOGITS.encode_part(records)
    assert data == LOGITS.encode_part(records)
    for one, other in zip(LOGITS.decode_part(data, "x"), records, strict=True):
        assert_equal(one, other)
    path = tmp_path / "part.parquet"
    path.write_bytes(data)
    file = open_logits_part(path)
    assert file.num_row_groups == 3
    assert_equal(read_row_group(file, 1), records[1])


def test_damage_is_named():
    data = LOGITS.encode_part([record(length=50)])
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(DataError, match="part x is truncated or altered"):
            LOGITS.decode_part(data[:cut], "x")
    altered = bytearray(data)
    altered[len(data) // 3] ^= 1
    with pytest.raises(DataError, match="part x is truncated or altered"):
        LOGITS.decode_part(bytes(altered), "x")
    payload = encode_logits(record())
    for bad in (payload[:3], payload[:-1], payload + b"x"):
        with pytest.raises(DataError, match="payload"):
            decode_logits(bad)


def test_arrays_must_fit():
    good = record()
    assert good.top_token == good.tokens.max()
    assert record(length=0).top_token == -1
    with pytest.raises(DataError, match="record 0: tokens and probabilities must be"):
        LogitRecord(0, good.tokens, good.probabilities[:, :2], good.rest)
