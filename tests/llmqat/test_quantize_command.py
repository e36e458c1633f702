"""`llmqat quantize`: what every method writes can be read by `llmqat eval`."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat import QATConfig, cli
from llmqat.convert import convert, state_of
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_tokenizer import save_tokenizer

BITS = ("--bits", "4-8-4", "--kv-mode", "serving")
SMALL = ("--sequences", "8", "--seq-len", "16", "--batch-size", "4")
METHODS = {
    "rtn": (),
    "smoothquant": ("--alpha", "0", "--folds", "norms+down"),
    "gptq": ("--act-order", "--damping", "0.02"),
    "awq": ("--grid", "4"),
    "zeroquant": ("--steps", "4", "--lr", "1e-3"),
}


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plain"
    llmqat.save_pretrained(tiny_llama(tied=True, dtype=torch.bfloat16), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Ids as jsonl, words as txt."""
    folder = tmp_path_factory.mktemp("texts")
    rows = random_tokens(1, 20, 40)
    lines = (json.dumps({"input_ids": row}) for row in rows.tolist())
    (folder / "ids.jsonl").write_text("\n".join(lines))
    words = (f"w{i}" for i in rows[rows >= 3].tolist())
    (folder / "words.txt").write_text(" ".join(words))
    return folder


def quantize(capsys, *argv):
    assert cli.main(["quantize", *map(str, argv), "--json"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(model, texts, tmp_path, capsys, method):
    output = tmp_path / "packed"
    data = () if method == "rtn" else ("--calibration", texts / "words.txt", *SMALL)
    argv = ("--model", model, "--method", method, "--output", output, *BITS, *data)
    result = quantize(capsys, *argv, *METHODS[method], "--verify")
    assert (result["method"], result["setting"]) == (method, "4-8-4")
    assert result["verified"]["tensors"] > 0
    packed = llmqat.from_pretrained(output)
    assert state_of(packed).stage == "packed"
    assert packed.dtype == torch.bfloat16
    if method == "rtn":
        assert result["calibration"] is None and result["options"] == {}
        config = QATConfig.parse("4-8-4", kv_mode="serving")
        expected = convert(llmqat.from_pretrained(model), config)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, packed.state_dict()[name])
    else:
        assert len(result["options"]) == 1 + len([o for o in METHODS[method] if o[:2] == "--"])
        assert (result["calibration"]["sequences"], result["calibration"]["seq_len"]) == (8, 16)
    text = str(texts / "words.txt")
    argv = ["--model", str(output), "--text", text, "--seq-len", "32", "--json"]
    assert cli.main(["eval", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "packed"
    assert not list(tmp_path.glob(".*"))


def test_a_line_for_people(model, tmp_path, capsys):
    argv = ["--model", str(model), "--method", "rtn", "--output", str(tmp_path / "m"), *BITS]
    assert cli.main(["quantize", *argv]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'm'}: rtn 4-8-4, 0.")


def test_smoothed_float_model(model, texts, tmp_path, capsys):
    output = tmp_path / "smooth"
    argv = ("--model", model, "--method", "smoothquant", "--output", output, "--keep-float")
    result = quantize(capsys, *argv, "--calibration", texts / "ids.jsonl", *SMALL)
    assert result["setting"] is None
    loaded, plain = llmqat.from_pretrained(output), llmqat.from_pretrained(model)
    assert state_of(loaded) is None and loaded.dtype == torch.bfloat16
    assert not torch.equal(
        loaded.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight
    )
    result = quantize(
        capsys, "--model", output, "--method", "rtn", "--output", tmp_path / "m", *BITS
    )
    assert result["setting"] == "4-8-4"


def test_same_options_same_bytes(model, texts, tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        argv = ("--model", model, "--method", "gptq", "--output", tmp_path / name, *BITS, *SMALL)
        quantize(capsys, *argv, "--calibration", texts / "ids.jsonl", texts / "words.txt")
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_dtype(model, texts, tmp_path, capsys):
    argv = ("--model", model, "--method", "gptq", "--output", tmp_path / "m", *BITS, *SMALL)
    quantize(capsys, *argv, "--calibration", texts / "ids.jsonl", "--dtype", "float32")
    assert llmqat.from_pretrained(tmp_path / "m").dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--method": "magic"}, "--method: 'magic' is not supported; use rtn, smoothquant"),
        ({"--calibration": None}, "--calibration: --method gptq looks at text"),
        ({"--calibration": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"--bits": None, "--kv-mode": None}, "--bits: not given"),
        ({"--bits": "4-8"}, "bits: '4-8' is not a W-A-KV setting"),
        ({"--bits": "16-8-8"}, "w_bits: 16 leaves nothing to pack"),
        ({"--bits": "4-8-6"}, "kv_bits: 6 has no packed KV cache"),
        ({"--group-size": "48"}, "group_size: 48 does not divide the 64"),
        ({"--alpha": "0.5"}, "--alpha: means nothing to --method gptq"),
        ({"--method": "awq", "--damping": "0.5"}, "--damping: means nothing to --method awq"),
        ({"--method": "rtn"}, "--calibration: means nothing to --method rtn"),
        ({"--damping": "0"}, "damping: 0.0"),
        ({"--seq-len": "1"}, "--seq-len: 1 is not supported"),
        ({"--seq-len": "513"}, "513 ids a sequence, the model has 512 positions"),
        ({"--seq-len": "4096"}, "less than one block"),
        ({"--sequences": "0"}, "--sequences: 0"),
        ({"--seed": "-1"}, "--seed: -1"),
        ({"--batch-size": "0"}, "--batch-size: 0"),
        ({"--model": "nowhere"}, "nowhere is not a folder"),
        ({"--device": "tpu"}, "device: 'tpu'"),
        ({"--dtype": "int8"}, "dtype: 'int8'"),
        ({"--compute-dtype": "int8"}, "--compute-dtype: 'int8' is not supported"),
        ({"--rank": "4"}, "--rank: low-rank factors have no packed form"),
        ({"--rank": "4"}, "llmqat eval --method gptq --rank 4"),
        ({"--method": "awq", "--rank": "4"}, "--rank: means nothing to --method awq"),
        ({"--method": "smoothquant", "--alpha": "2"}, "alpha: 2.0"),
        ({"--method": "smoothquant", "--resume": "true"}, "--resume: --method smoothquant"),
        ({"--method": "smoothquant", "--keep-float": "true"}, "--keep-float quantizes nothing"),
        ({"--method": "smoothquant", "--folds": "x"}, "folds: 'x' is not supported"),
    ],
)
def test_bad_arguments_are_one_line(model, texts, tmp_path, capsys, change, message):
    options = {
        "--model": model,
        "--method": "gptq",
        "--output": tmp_path / "out",
        "--bits": "4-8-4",
        "--calibration": texts / "ids.jsonl",
        "--seq-len": "16",
        **change,
    }
    argv = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    assert cli.main(["quantize", *argv]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_serve(model, texts, tmp_path, capsys):
    rtn = ["quantize", "--method", "rtn", *BITS]
    assert cli.main([*rtn, "--model", str(model), "--output", str(model)]) == 1
    assert "is the model's own folder" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("x")
    assert cli.main([*rtn, "--model", str(model), "--output", str(file)]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err
    packed = str(tmp_path / "packed")
    assert cli.main([*rtn, "--model", str(model), "--output", packed]) == 0
    assert cli.main([*rtn, "--model", packed, "--output", str(tmp_path / "again")]) == 1
    assert "is packed as 4-8-4 already" in capsys.readouterr().err


def test_text_without_tokenizer(texts, tmp_path, capsys):
    llmqat.save_pretrained(tiny_llama(), tmp_path / "bare")
    argv = ["--model", tmp_path / "bare", "--method", "gptq", "--output", tmp_path / "m", *BITS]
    assert cli.main(["quantize", *map(str, argv), "--calibration", str(texts / "words.txt")]) == 1
    assert "is text: give a tokenizer" in capsys.readouterr().err
    quantize(capsys, *argv, "--calibration", texts / "ids.jsonl", *SMALL)


def test_killed_and_resumed(texts, tmp_path, capsys):
    """SIGKILL in the middle: `--resume` gives the bytes of an undisturbed run."""
    llmqat.save_pretrained(tiny_llama(layers=8), tmp_path / "plain")
    argv = ["--model", tmp_path / "plain", "--method", "gptq", *BITS, *SMALL]
    argv = [*map(str, argv), "--calibration", str(texts / "ids.jsonl")]
    quantize(capsys, *argv, "--output", tmp_path / "whole")
    output, journal = tmp_path / "out", tmp_path / ".out.quantize"
    code = (
        "import sys, llmqat_kernels as qk\nfrom llmqat import cli\n"
        "with qk.use_backend('reference'): cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "quantize", *argv, "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal / "block-00001.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert (
        cli.main(["quantize", *argv, "--output", str(output), "--damping", "0.5", "--resume"]) == 1
    )
    assert "is of a run with another options" in capsys.readouterr().err
    quantize(capsys, *argv, "--output", output, "--resume")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (output / "model.safetensors").read_bytes() == whole
    assert not journal.exists()
