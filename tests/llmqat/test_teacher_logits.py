"""Saved teacher logits: what is written, that a kill changes nothing, and training from them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

import llmqat
from llmqat import cli
from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.data import Record, RecordWriter, open_dataset
from llmqat.data.dataset import PackedDataset
from llmqat.data.teacher import teacher_digest
from llmqat.data.teacher_logits import FOLDER, TeacherLogits, fill_logits, logit_writer
from llmqat.errors import ConfigError, DataError
from llmqat.models.heads import last_hidden
from llmqat.train import run
from llmqat.train.metrics import read_metrics
from tests.llmqat.tiny import random_tokens, tiny_llama

VOCAB = 128
pytestmark = pytest.mark.usefixtures("on_reference")


def write_records(folder, lengths, per_part=4):
    with RecordWriter(
        folder, {"vocab_size": VOCAB}, records=len(lengths), records_per_part=per_part
    ) as writer:
        writer.write(
            Record(i, random_tokens(i, 1, length)[0].numpy()) for i, length in enumerate(lengths)
        )
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    llmqat.save_pretrained(tiny_llama(tied=True, vocab=VOCAB), folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """Ten records of different lengths, one of them a single token."""
    return write_records(tmp_path / "data", [7, 12, 1, 9, 16, 3, 16, 5, 11, 6])


def save(teacher, data, *more):
    argv = ["teacher-logits", "--model", str(teacher), "--data", str(data), *more]
    return cli.main(argv)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def exact(teacher, ids):
    with torch.no_grad():
        return torch.softmax(llmqat.from_pretrained(teacher)(ids[None]).logits[0].float(), -1)


def test_each_record_has_its_own_context(teacher, data):
    assert save(teacher, data, "--top-k", "5", "--precision", "float32", "--batch-size", "3") == 0
    saved = TeacherLogits(data)
    for number, record in enumerate(open_dataset(data)):
        rows = saved.rows(number)
        expected, tokens = exact(teacher, torch.tensor(record.input_ids).long()).topk(5)
        assert rows["teacher_tokens"].shape == (record.length, 5)
        assert np.array_equal(rows["teacher_tokens"], tokens)
        np.testing.assert_allclose(rows["teacher_probabilities"], expected, rtol=1e-4, atol=1e-7)
    assert saved.config["teacher_sha256"] == teacher_digest(str(teacher))
    assert saved.config["data_sha256"] == open_dataset(data).fingerprint


def test_half_precision_and_what_is_left_out(teacher, data, capsys):
    assert save(teacher, data, "--top-k", "4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["records"], result["kept_records"], result["tokens"]) == (10, 0, 86)
    rest = []
    saved = TeacherLogits(data)
    for number, record in enumerate(open_dataset(data)):
        top = exact(teacher, torch.tensor(record.input_ids).long()).topk(4).values
        rows = saved.rows(number)["teacher_probabilities"]
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows, top, rtol=1e-3)
        rest.append(1 - top.sum(-1))
    assert result["rest"] == pytest.approx(torch.cat(rest).mean().item(), abs=1e-5)


def test_killed_and_resumed_writes_the_same_files(teacher, data, tmp_path):
    whole = shutil.copytree(data, tmp_path / "whole")
    assert save(teacher, whole, "--top-k", "5", "--batch-size", "3") == 0
    dataset = open_dataset(data)
    options = {"top_k": 5, "precision": "float16"}
    model = llmqat.from_pretrained(teacher, dtype=torch.float32)

    class Killed(Exception):
        pass

    def open_writer(limit):
        writer = logit_writer(
            dataset, teacher_digest(str(teacher)), VOCAB, dtype="float32", **options
        )
        write = writer.write

        def dying(rows):
            nonlocal limit
            rows = list(rows)
            write(rows[:limit])  # a kill may tear a batch apart
            limit -= len(rows)
            if limit <= 0:
                raise Killed

        writer.write = dying
        return writer

    for limit in (1, 2, 4, 1, 100):
        with open_writer(limit) as writer:
            try:
                fill_logits(writer, dataset, model, batch_size=3, progress=False, **options)
            except Killed:
                continue
    one, other = (contents(folder / FOLDER / "parts") for folder in (data, whole))
    assert one == other
    assert not (data / FOLDER / "journal.bin").exists()
    assert save(teacher, data, "--top-k", "5", "--batch-size", "3") == 0  # nothing to do
    assert contents(data / FOLDER / "parts") == other


def test_killed_process(teacher, data, tmp_path):
    """A process that dies between a part and its manifest."""
    whole = shutil.copytree(data, tmp_path / "whole")
    assert save(teacher, whole, "--top-k", "5") == 0
    child = os.fork()
    if child == 0:
        real, count = os.replace, 0

        def replace(*paths):
            nonlocal count
            real(*paths)
            count += 1
            if count == 4:
                os._exit(9)

        os.replace = replace
        save(teacher, data, "--top-k", "5")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(DataError):
        TeacherLogits(data)
    assert save(teacher, data, "--top-k", "5") == 0
    assert contents(data / FOLDER / "parts") == contents(whole / FOLDER / "parts")
    TeacherLogits(data)


def test_shards_give_the_same_parts(teacher, data, tmp_path):
    whole = shutil.copytree(data, tmp_path / "whole")
    assert save(teacher, whole) == 0
    for shard in ("0/2", "1/2"):
        assert save(teacher, data, "--shard", shard) == 0
    assert contents(data / FOLDER / "parts") == contents(whole / FOLDER / "parts")
    assert TeacherLogits(data).fingerprint == TeacherLogits(whole).fingerprint


def test_other_teachers_and_records_are_refused(teacher, data, tmp_path, capsys):
    with pytest.raises(DataError, match="no saved teacher logits; run llmqat teacher-logits"):
        TeacherLogits(data)
    assert save(teacher, data) == 0
    llmqat.save_pretrained(tiny_llama(1, tied=True, vocab=VOCAB), tmp_path / "other")
    assert save(tmp_path / "other", data) == 1
    assert "another run: config.teacher_sha256" in capsys.readouterr().err
    assert save(teacher, data, "--top-k", "9") == 1
    assert "another run: config.top_k" in capsys.readouterr().err
    write_records(tmp_path / "records", [7] * 10)
    shutil.copytree(data / FOLDER, tmp_path / "records" / FOLDER)
    with pytest.raises(DataError, match="was written for other records"):
        TeacherLogits(tmp_path / "records")
    assert save(teacher, tmp_path / "records") == 1
    assert "another run: config.data_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--top-k", "0"), "top_k: 0 must be 1..128"),
        (("--top-k", "129"), "top_k: 129 must be 1..128"),
        (("--precision", "bfloat16"), "precision: 'bfloat16' is not supported"),
        (("--batch-size", "0"), "batch_size: 0 must be at least 1"),
    ],
)
def test_refused_options(teacher, data, capsys, more, message):
    assert save(teacher, data, *more) == 1
    assert message in capsys.readouterr().err


def test_a_damaged_part(teacher, data):
    assert save(teacher, data) == 0
    path = sorted((data / FOLDER / "parts").iterdir())[1]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    saved = TeacherLogits(data)
    saved.rows(0)
    with pytest.raises(DataError, match=r"part .* is truncated or altered: .*SHA-256"):
        saved.rows(4)


def test_packing_keeps_every_row_at_its_token(teacher, data):
    assert save(teacher, data, "--top-k", "5") == 0
    saved = TeacherLogits(data)
    packed = PackedDataset.from_path(data, 8, seed=3, targets=saved, position_ids=True)
    rows = {number: saved.rows(number) for number in range(10)}
    records = list(open_dataset(data))
    stream = np.concatenate([records[number].input_ids for number in packed._numbers])
    for name in ("teacher_tokens", "teacher_probabilities"):
        expected = np.concatenate([rows[number][name] for number in packed._numbers])
        items = torch.cat([item[name] for item in packed])
        assert np.array_equal(items, expected[: len(packed) * 8])
    ids = torch.cat([item["input_ids"] for item in packed])
    assert np.array_equal(ids, stream[: len(packed) * 8])
    plain = PackedDataset.from_path(data, 8, seed=3, position_ids=True)
    assert plain.fingerprint != packed.fingerprint
    assert packed[0]["teacher_tokens"].dtype == torch.int64
    with pytest.raises(ConfigError, match="targets: have no rows for added tokens"):
        PackedDataset.from_path(data, 8, targets=saved, eos_id=1)


def _train(teacher, data, output, *more):
    return cli.main([
        "train", "--model", str(teacher), "--data", str(data), "--output", str(output),
        "--bits", "4-8-4", "--kv-mode", "serving", "--lr", "1e-3", "--steps", "3",
        "--batch-size", "2", "--seq-len", "16", *more,
    ])  # fmt: skip


def _losses(output):
    return [entry["loss"] for entry in read_metrics(output / "metrics.jsonl")]


@pytest.mark.parametrize("loss", ["logits", "label+logits"])
def test_training_equals_the_live_teacher(teacher, tmp_path, loss, monkeypatch):
    """Every block one record, every probability kept: the same losses without a teacher."""
    data = write_records(tmp_path / "data", [16] * 8)
    assert save(teacher, data, "--top-k", str(VOCAB), "--precision", "float32") == 0
    assert _train(teacher, data, tmp_path / "live", "--loss", loss) == 0
    loaded, load = [], run.load_plain
    monkeypatch.setattr(run, "load_plain", lambda role, *a: loaded.append(role) or load(role, *a))
    assert _train(teacher, data, tmp_path / "saved", "--loss", loss, "--teacher-logits") == 0
    assert loaded == ["model"]
    live, saved = _losses(tmp_path / "live"), _losses(tmp_path / "saved")
    assert len(live) == 3
    assert saved == pytest.approx(live, rel=1e-5)


def test_top_k_in_half_precision_is_close(teacher, tmp_path):
    data = write_records(tmp_path / "data", [16] * 8)
    assert save(teacher, data, "--top-k", str(VOCAB)) == 0
    assert _train(teacher, data, tmp_path / "live") == 0
    assert _train(teacher, data, tmp_path / "saved", "--teacher-logits") == 0
    assert _losses(tmp_path / "saved") == pytest.approx(_losses(tmp_path / "live"), rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_records_of_a_block_do_not_see_each_other(fused):
    config = QATConfig.parse("4-8-4", kv_mode="serving")
    student = prepare(tiny_llama(), config, fused=fused)
    records = [random_tokens(i, 1, length)[0].numpy() for i, length in enumerate((5, 7))]
    item = PackedDataset(records, 12, seed=None, position_ids=True)[0]
    with torch.no_grad():
        block = {name: value[None] for name, value in item.items()}
        packed = student.lm_head(last_hidden(student, block))[0]  # as the trainer calls it
        alone = [student(torch.from_numpy(ids)[None].long()).logits[0] for ids in records]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_training_on_short_records(teacher, data, tmp_path):
    assert save(teacher, data, "--top-k", "16") == 0
    for name, more in (("off", ()), ("on", ("--gradient-checkpointing",))):
        options = ("--teacher-logits", "--loss", "label+logits", "--seq-len", "20", *more)
        assert _train(teacher, data, tmp_path / name, *options) == 0
    assert _losses(tmp_path / "on") == _losses(tmp_path / "off")
    record = json.loads((tmp_path / "on" / "llmqat_run.json").read_text())
    assert record["arguments"]["teacher_logits"] is True


def test_refused_training(teacher, data, tmp_path, capsys):
    more = ["--teacher-logits"]
    assert _train(teacher, data, tmp_path / "a", *more) == 1
    assert "no saved teacher logits" in capsys.readouterr().err
    assert save(teacher, data) == 0
    llmqat.save_pretrained(tiny_llama(1, tied=True, vocab=VOCAB), tmp_path / "other")
    assert _train(teacher, data, tmp_path / "b", *more, "--teacher", str(tmp_path / "other")) == 1
    assert "was written by another teacher" in capsys.readouterr().err
    assert _train(teacher, data, tmp_path / "c", *more, "--loss", "logits+hidden") == 1
    assert "--teacher-logits: serves logits and label+logits, not" in capsys.readouterr().err
    assert _train(teacher, data, tmp_path / "d", *more, "--loss", "label") == 1
    assert "loss label has no use for them" in capsys.readouterr().err
    llmqat.save_pretrained(tiny_llama(tied=True, vocab=256), tmp_path / "large")
    assert _train(tmp_path / "large", data, tmp_path / "e", *more) == 1
    assert "a vocabulary of 128, the student of 256" in capsys.readouterr().err
    assert _train(teacher, data, tmp_path / "f", *more, "--teacher", str(teacher)) == 0


def test_a_smoothed_student_starts_elsewhere_than_its_teacher(teacher, data, tmp_path):
    """--model and --teacher may differ: no option of its own is needed for that."""
    llmqat.save_pretrained(tiny_llama(1, tied=True, vocab=VOCAB), tmp_path / "start")
    assert _train(tmp_path / "start", data, tmp_path / "out", "--teacher", str(teacher)) == 0
    assert _train(teacher, data, tmp_path / "same") == 0
    assert _losses(tmp_path / "out")[0] > _losses(tmp_path / "same")[0]
