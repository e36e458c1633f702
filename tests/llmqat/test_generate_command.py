"""`llmqat generate` on packed, prepared and plain folders."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from llmqat import QATConfig, convert, prepare, save_pretrained
from llmqat.cli import main
from llmqat.runtime.loading import stop_ids
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_families import tiny_model
from tests.llmqat.tiny_tokenizer import save_tokenizer


@pytest.fixture
def plain(tmp_path):
    folder = tmp_path / "plain"
    tiny_llama(1, layers=1, eos_token_id=2).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def command(folder, *options):
    return main(["generate", "--model", str(folder), "--prompt", "w5 w6 w7", *options])


def quantized_folder(tmp_path, plain, stage):
    model = prepare(tiny_llama(1, layers=1, eos_token_id=2), QATConfig.parse("4-8-8"))
    if stage == "packed":
        convert(model)
    save_pretrained(model, tmp_path / stage, tokenizer=plain)
    return tmp_path / stage


@pytest.mark.parametrize("stage", ["packed", "prepared"])
def test_quantized_folders(tmp_path, plain, stage, capsys):
    folder = quantized_folder(tmp_path, plain, stage)
    assert command(folder, "--max-new-tokens", "6", "--greedy", "--json", "--threads", "1") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kv_bits"] == 8 and result["kv_mode"] == "paper" and result["threads"] == 1
    assert result["prompt_tokens"] == 3 and result["tokens_per_second"] > 0
    assert result["weight_bytes"]["linears"] < 30_000 and result["cache_bytes"] > 0
    model = prepare(tiny_llama(1, layers=1, eos_token_id=2), QATConfig.parse("4-8-8"))
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    words = [f"w{i}" if i > 2 else "</s>" for i in expected[0, 3:].tolist()]
    assert result["text"].split() == words


def test_graphs_can_be_left_out(plain, capsys):
    """On the CPU there are none, so the text is the same; asking Python for them is an error."""
    texts = []
    for options in ((), ("--no-graphs",)):
        assert command(plain, "--max-new-tokens", "4", "--json", *options) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]


def test_text_is_streamed_and_figures_go_to_stderr(plain, capsys):
    assert command(plain, "--max-new-tokens", "4", "--kv-bits", "4", "--kv-mode", "serving") == 0
    out, err = capsys.readouterr()
    assert out.startswith("w5 w6 w7 ") and len(out.split()) >= 4
    assert "tok/s" in err and "KV cache 4-bit serving" in err and "MiB" in err


def test_a_cache_of_floats_is_called_so(tmp_path, plain, capsys):
    """The engine has no code for GPT-2: transformers' cache holds the rounded values."""
    model = prepare(tiny_model("gpt2"), QATConfig.parse("4-8-8"))
    save_pretrained(convert(model), tmp_path / "gpt2", tokenizer=plain)
    assert command(tmp_path / "gpt2", "--max-new-tokens", "2") == 0
    assert "KV cache 8-bit paper values, held as floats," in capsys.readouterr().err


def test_seed_decides_the_text(plain, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert command(plain, "--max-new-tokens", "12", "--seed", seed, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options,word",
    [
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--temperature", "0"), "temperature"),
        (("--top-k", "-1"), "top_k"),
        (("--kv-bits", "5"), "kv_bits"),
        (("--kv-mode", "other"), "kv_mode"),
        (("--head-bits", "4"), "head_bits"),
        (("--dtype", "int4"), "dtype"),
        (("--device", "cuda:99" if not torch.cuda.is_available() else "tpu"), "device"),
        (("--prompt", ""), "prompt"),
        (("--prompt", "w5 " * 512), "prompt"),
    ],
)
def test_errors(plain, capsys, options, word):
    assert command(plain, *options) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert word in err[-1] and err[-1].startswith("llmqat generate: ")


def test_a_folder_without_tokenizer(tmp_path, capsys):
    tiny_llama(1, layers=1).save_pretrained(tmp_path)
    assert command(tmp_path) == 1
    assert "no tokenizer file" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text("{")
    assert command(tmp_path) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_stop_ids():
    model = tiny_llama(0, layers=1, eos_token_id=2)
    model.generation_config.eos_token_id = [7, 5]
    assert stop_ids(model) == (5, 7)
    model.generation_config.eos_token_id = None
    assert stop_ids(model) == (2,)
    model.config.eos_token_id = None
    assert stop_ids(model) == ()


@pytest.fixture
def windowed(tmp_path):
    """A Mistral that attends to 16 tokens."""
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, sliding_window=16,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--max-new-tokens", "500"),
            "--max-new-tokens: 500 after a prompt of 3 tokens is more than the model's sliding"
            " window of 16 tokens, which the engine cannot leave; use at most 13",
        ),
        (("--prompt", "w5 " * 16), "prompt: its 16 tokens fill the model's sliding window of 16"),
    ],
)
def test_a_text_longer_than_the_window(windowed, options, says, capsys):
    assert command(windowed, *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"llmqat generate: {says}")


def test_a_text_that_fits_the_window(windowed, capsys):
    assert command(windowed, "--max-new-tokens", "13", "--json") == 0
    assert "--max-new-tokens" not in capsys.readouterr().err


def test_the_end_of_the_positions_is_said(tmp_path, capsys):
    model = tiny_llama(1, layers=1, eos_token_id=None)
    model.config.max_position_embeddings = 8
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert command(tmp_path, "--max-new-tokens", "5000", "--json") == 0
    out, error = capsys.readouterr()
    assert (
        "llmqat generate: --max-new-tokens: 5000 is more than the model's 8 positions leave; at"
        " most 5 tokens are added\n" in error
    )
    assert json.loads(out)["new_tokens"] == 5


def test_the_folder_and_its_family_are_checked_before_the_tokenizer(tmp_path, capsys):
    assert command(tmp_path / "nope") == 1
    assert f"generate: --model: {tmp_path / 'nope'} is not a folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert command(tmp_path) == 1
    assert "model_type 'bert' is not supported" in capsys.readouterr().err
