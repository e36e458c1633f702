"""`llmqat eval`: one number of every kind of model, one JSON object, one-line errors."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llmqat
import llmqat_kernels as qk
from llmqat import QATConfig, cli
from llmqat.eval.perplexity import perplexity
from llmqat.eval.run import QUANTIZERS
from tests.llmqat.tiny import tiny_llama

VOCAB, TOKENS = 128, 300
CONFIG = QATConfig.parse("4-8-4", kv_mode="serving")


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model, three ways: full precision, prepared, packed."""
    root = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    with qk.use_backend("reference"):
        for stage in ("plain", "prepared", "packed"):
            model = tiny_llama(tied=True, vocab=VOCAB)
            if stage != "plain":
                llmqat.prepare(model, CONFIG)
            if stage == "packed":
                llmqat.convert(model)
            llmqat.save_pretrained(model, root / stage, tokenizer=tokenizer)
    return root


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def text(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


def _json(capsys, *argv):
    assert cli.main(["eval", *map(str, argv), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_contract(folders, text, ids, capsys):
    model = folders / "plain"
    result = _json(capsys, "--model", model, "--text", text, "--seq-len", 32)
    expected = perplexity(llmqat.from_pretrained(model), ids, 32, progress=False)
    assert result["perplexity"] == expected.perplexity
    assert result["nll"] == math.log(result["perplexity"]) or result["nll"] == expected.nll
    assert result["tokens"] == TOKENS // 32 * 31
    assert (result["setting"], result["stage"]) == ("16-16-16", "full_precision")
    assert (result["model"], result["seq_len"]) == (str(model), 32)
    assert result["seconds"] > 0


def test_every_quantized_form_has_the_same_perplexity(folders, text, capsys):
    common = ("--text", text, "--seq-len", 32)
    bits = ("--bits", "4-8-4", "--kv-mode", "serving")
    rtn = _json(capsys, "--model", folders / "plain", *common, *bits)
    prepared = _json(capsys, "--model", folders / "prepared", *common)
    packed = _json(capsys, "--model", folders / "packed", *common)
    full = _json(capsys, "--model", folders / "plain", *common)
    assert rtn["perplexity"] == prepared["perplexity"] == packed["perplexity"]
    assert rtn["perplexity"] != full["perplexity"]
    assert [r["stage"] for r in (rtn, prepared, packed)] == ["rtn", "prepared", "packed"]
    assert {r["setting"] for r in (rtn, prepared, packed)} == {"4-8-4"}
    assert {r["kv_mode"] for r in (rtn, prepared, packed)} == {"serving"}
    again = _json(capsys, "--model", folders / "packed", *common, *bits)
    assert again["perplexity"] == packed["perplexity"]


def test_the_record_says_which_scales(folders, text, capsys):
    options = ("--bits", "4-8-16", "--group-size", 8, "--weight-scale-dtype", "integer")
    common = ("--model", folders / "plain", "--text", text, "--seq-len", 32, *options)
    record = _json(capsys, *common)
    assert (record["group_size"], record["weight_scale_dtype"]) == (8, "integer")
    assert cli.main(["eval", *map(str, common)]) == 0
    assert "groups of 8, integer scales" in capsys.readouterr().out


def test_where_no_result_can_be_written(folders, text, tmp_path, capsys):
    """It is said before the work, not after it."""
    common = ("eval", "--model", "nowhere", "--text", str(text), "--output")
    for output, words in ((tmp_path, "is a folder"), (tmp_path / "a" / "b.json", "is no folder")):
        assert cli.main([*common, str(output)]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"w_quantizer": "statsq", "a_quantizer": "lsq", "kv_quantizer": "asymmetric"},
        {"a_group_size": 8, "a_group_axis": "channel_per_token"},
        {"numerics": "official"},
        {},
    ],
)
def test_the_record_and_the_line_say_which_quantizers(folders, text, capsys, changes):
    common = ["--model", folders / "plain", "--text", text, "--seq-len", 32, "--bits", "4-8-8"]
    for name, value in changes.items():
        common += [f"--{name.replace('_', '-')}", value]
    record = _json(capsys, *common)
    assert {name: record[name] for name in QUANTIZERS} == {
        name: changes.get(name, getattr(QATConfig, name)) for name in QUANTIZERS
    }
    assert cli.main(["eval", *map(str, common)]) == 0
    said = "".join(f", {name.replace('_', '-')} {value}" for name, value in changes.items())
    assert f"(rtn{said}, 279 tokens" in capsys.readouterr().out


def test_full_precision_has_no_quantizers(folders, text, capsys):
    record = _json(capsys, "--model", folders / "plain", "--text", text, "--seq-len", 32)
    assert {record[name] for name in QUANTIZERS} == {None}


def test_options(folders, text, capsys):
    common = ("--model", folders / "plain", "--text", text, "--seq-len", 32)
    whole = _json(capsys, *common)
    batched = _json(capsys, *common, "--batch-size", 4)
    assert batched["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    first = _json(capsys, *common, "--max-tokens", 64)
    assert (first["windows"], first["tokens"]) == (2, 62)
    half = _json(capsys, *common, "--dtype", "bfloat16", "--bits", "8-8-16")
    assert half["perplexity"] == pytest.approx(whole["perplexity"], rel=0.1)
    by_field = _json(capsys, *common, "--w-bits", 8, "--a-bits", 8, "--kv-bits", 16)
    assert by_field["setting"] == "8-8-16"


def test_a_line_for_people(folders, text, capsys):
    argv = ["eval", "--model", str(folders / "plain"), "--text", str(text), "--seq-len", "32"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("perplexity ")


def test_progress_goes_to_stderr(folders, text, capsys):
    _ = cli.main(
        [
            "eval",
            "--model",
            str(folders / "plain"),
            "--text",
            str(text),
            "--seq-len",
            "32",
            "--json",
        ]
    )
    captured = capsys.readouterr()
    assert "ppl" in captured.err
    json.loads(captured.out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "nowhere is not a folder"),
        ({"--text": "nowhere.txt"}, "no text file at nowhere.txt"),
        ({"--bits": "4-8"}, "bits: '4-8' is not a W-A-KV setting"),
        ({"--kv-mode": "serving"}, "--bits: not given"),
        ({"--seq-len": "1"}, "--seq-len: 1 is not supported; use an integer of at least 2"),
        ({"--seq-len": "513"}, "seq_len: the model has 512 positions"),
        ({"--seq-len": "512"}, "use more text or a smaller seq_len"),
        ({"--max-tokens": "0"}, "--max-tokens: 0"),
        ({"--dtype": "int8"}, "dtype: 'int8' is not supported"),
        ({"--device": "tpu"}, "device: 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(folders, text, capsys, change, message):
    options = {"--model": folders / "plain", "--text": text, "--seq-len": "32", **change}
    assert cli.main(["eval", *(str(part) for pair in options.items() for part in pair)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_contradicting_bits(folders, text, capsys, stage):
    argv = ["--model", str(folders / stage), "--text", str(text), "--bits", "8-8-8"]
    assert cli.main(["eval", *argv]) == 1
    assert f"is {stage} as 4-8-4 (serving), with other settings" in capsys.readouterr().err


def test_a_folder_without_tokenizer(folders, text, tmp_path, capsys):
    llmqat.save_pretrained(tiny_llama(), tmp_path / "bare")
    argv = ["--model", str(tmp_path / "bare"), "--text", str(text), "--seq-len", "32"]
    assert cli.main(["eval", *argv]) == 1
    assert "no tokenizer file" in capsys.readouterr().err
