"""`llmqat export`: prepared folders, round-to-nearest of plain ones, sizes, verification."""

from __future__ import annotations

import json

import pytest
import torch

from llmqat import QATConfig, convert, from_pretrained, prepare, save_pretrained
from llmqat.cli import main
from llmqat.models.families import find_family, iter_linears
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_tokenizer


def model(**fields):
    return tiny_llama(2, layers=1, **fields)


@pytest.fixture
def plain(tmp_path):
    folder = tmp_path / "plain"
    model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def export(folder, output, *options):
    return main(["export", "--model", str(folder), "--output", str(output), *options])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_prepared_folder(tmp_path, plain, capsys, dtype):
    save_pretrained(prepare(model(), QATConfig.parse("4-8-4")), tmp_path / "qat", tokenizer=plain)
    options = () if dtype is None else ("--dtype", dtype)
    assert export(tmp_path / "qat", tmp_path / "packed", "--verify", "--json", *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["setting"] == "4-8-4" and result["verified"]["tensors"] > 0
    # Rows of 64 and 96 columns: scales and shapes weigh more here than in a real model (0.26x).
    assert 0.25 < result["linear_ratio"] < 0.35
    loaded = from_pretrained(tmp_path / "packed")
    assert loaded.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    # The codes are those of the fp32 weights, whatever the type of the rest.
    expected = convert(prepare(model(), QATConfig.parse("4-8-4")))
    pairs = zip(
        iter_linears(loaded, find_family(loaded)),
        iter_linears(expected, find_family(expected)),
        strict=True,
    )
    for (_, _, ours), (_, _, theirs) in pairs:
        assert torch.equal(ours.weight_codes, theirs.weight_codes)
        assert torch.equal(ours.weight_scale, theirs.weight_scale)
    assert (tmp_path / "packed" / "tokenizer.json").is_file()


def test_round_to_nearest(tmp_path, plain, capsys):
    options = ("--bits", "8-8-8", "--kv-mode", "serving", "--group-size", "32", "--verify")
    assert export(plain, tmp_path / "packed", *options) == 0
    out = capsys.readouterr().out
    assert "8-8-8" in out and "x of bf16" in out and "verified" in out
    config = from_pretrained(tmp_path / "packed").llmqat_state.config
    assert config.kv_mode == "serving" and config.group_size == 32


def test_without_a_tokenizer(tmp_path, capsys):
    model().save_pretrained(tmp_path / "plain")
    assert export(tmp_path / "plain", tmp_path / "packed", "--bits", "4-8-16") == 0
    assert not (tmp_path / "packed" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "options,word",
    [
        ((), "not quantized"),
        (("--bits", "4-8"), "bits"),
        (("--bits", "16-8-8"), "w_bits"),
        (("--bits", "4-8-8", "--group-size", "7"), "group_size"),
        (("--bits", "4-8-8", "--kv-mode", "other"), "kv_mode"),
        (("--bits", "4-8-8", "--dtype", "int8"), "dtype"),
        (("--group-size", "16"), "--group-size: needs --bits"),
    ],
)
def test_errors(tmp_path, plain, capsys, options, word):
    assert export(plain, tmp_path / "packed", *options) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert word in err[-1] and err[-1].startswith("llmqat export: ")
    assert not (tmp_path / "packed").exists()


def test_other_models_are_not_replaced(tmp_path, plain, capsys):
    """Only a packed checkpoint is."""
    save_pretrained(model(), tmp_path / "float")
    save_pretrained(prepare(model(), QATConfig.parse("4-8-4")), tmp_path / "qat")
    for name, stage in (("float", "full-precision"), ("qat", "prepared")):
        before = (tmp_path / name / "model.safetensors").read_bytes()
        assert export(plain, tmp_path / name, "--bits", "4-8-8") == 1
        assert f"holds a {stage} model, which would be lost" in capsys.readouterr().err
        assert (tmp_path / name / "model.safetensors").read_bytes() == before
    for _ in range(2):
        assert export(plain, tmp_path / "packed", "--bits", "4-8-8") == 0


def test_wrong_folders(tmp_path, plain, capsys):
    assert export(plain, plain, "--bits", "4-8-8") == 1
    assert "own folder" in capsys.readouterr().err
    save_pretrained(prepare(model(), QATConfig.parse("4-8-4")), tmp_path / "qat")
    assert export(tmp_path / "qat", tmp_path / "packed", "--bits", "4-8-8") == 1
    assert "prepared as 4-8-4" in capsys.readouterr().err
    assert export(tmp_path / "qat", tmp_path / "packed", "--weight-scale-dtype", "integer") == 1
    assert "--weight-scale-dtype: needs --bits" in capsys.readouterr().err
    assert export(tmp_path / "qat", tmp_path / "packed") == 0
    capsys.readouterr()
    assert export(tmp_path / "packed", tmp_path / "again") == 1
    assert "packed already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert export(tmp_path / "qat", tmp_path / "file") == 1
    assert "file" in capsys.readouterr().err
