"""Families without engine code write tokens through their own forward: the same records, up to
ties.
"""

from __future__ import annotations

import json

import pytest
import torch

from llmqat.cli import main
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.data import open_dataset
from llmqat.data.generate import Recipe, generate_records
from llmqat.errors import ConfigError
from llmqat.runtime import Engine, Sampling
from llmqat.runtime.transformers_engine import TransformersEngine, open_engine
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_families import tiny_model
from tests.llmqat.tiny_tokenizer import save_tokenizer

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60]]


def records(engine, recipe, ids, stop_ids=()):
    steps = generate_records(engine, recipe, ids, list(range(3, 100)), stop_ids=stop_ids)
    return {record.record_id: record for step in steps for record in step}


def continued(model, prompt, new):
    """Greedy tokens of full forwards, without any cache."""
    tokens = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("strategy", ["hybrid", "greedy", "sampled"])
def test_a_llama_gives_the_engines_records(strategy):
    model, recipe = tiny_llama(), Recipe(strategy, max_len=20, seed=3)
    stops = (4, 5, 6, 7, 8, 9)
    want = records(Engine(model, max_slots=3, max_len=20), recipe, range(8), stops)
    got = records(TransformersEngine(model, max_slots=3, max_len=20), recipe, range(8), stops)
    assert got == want
    assert {r.finish_reason for r in want.values()} >= ({"eos"} if strategy != "greedy" else set())


@pytest.mark.parametrize("bits", [None, "4-8-8"])
@pytest.mark.parametrize("packed", [False, True])
def test_gpt2_prompts_of_any_length(bits, packed):
    model = tiny_model("gpt2")
    if bits is not None:
        prepare(model, QATConfig.parse(bits))
        model = convert(model) if packed else model
    engine = TransformersEngine(model, max_slots=2, max_len=16)
    assert engine.kv_bits == (16 if bits is None else 8)
    done = engine.generate(PROMPTS, 6)
    assert [c.tokens for c in done] == [continued(engine.model, p, 6) for p in PROMPTS]
    assert [c.finish_reason for c in done] == ["length"] * 3


def test_a_sequence_that_ends_leaves_its_batch():
    model = tiny_model("gpt2")
    alone = [continued(model.eval(), prompt, 8) for prompt in PROMPTS]
    stop = alone[0][len(PROMPTS[0])]  # the first one ends with its first token
    done = TransformersEngine(model, max_slots=3, max_len=16).generate(PROMPTS, 8, stop_ids=[stop])
    assert done[0].finish_reason == "eos" and done[0].tokens == alone[0][:4]
    for completion, tokens in zip(done, alone, strict=True):
        assert completion.tokens == tokens[: len(completion.tokens)]


def test_nan_logits_end_a_sequence_as_error():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    (done,) = TransformersEngine(model, max_len=8).generate([[3]], 4, Sampling(seed=1))
    assert done.finish_reason == "error" and done.tokens == [3]


def test_bytes_it_holds():
    model = tiny_model("gpt2")
    engine = TransformersEngine(model, max_slots=2, max_len=8)
    config = model.config
    assert engine.cache_bytes == 2 * config.n_layer * config.n_embd * 2 * 8 * 4
    tensors = [*model.parameters(), *model.buffers()]
    assert engine.weight_bytes == {"model": sum(t.nbytes for t in tensors)}


def test_which_engine_and_what_the_stand_in_refuses():
    gpt2 = tiny_model("gpt2")
    assert type(open_engine(tiny_llama(), max_slots=1, max_len=8)) is Engine
    assert type(open_engine(gpt2, max_slots=1, max_len=8)) is TransformersEngine
    with pytest.raises(ConfigError, match="kv_bits: 8 needs the engine"):
        open_engine(gpt2, max_slots=1, max_len=8, kv_bits=8)
    with pytest.raises(ConfigError, match="head_bits: 8 needs the engine"):
        open_engine(gpt2, max_slots=1, max_len=8, head_bits=8)
    with pytest.raises(InvalidArgument, match=r"max_len: 9999 is outside"):
        TransformersEngine(gpt2, max_len=9999)
    with pytest.raises(InvalidArgument, match="max_slots"):
        TransformersEngine(gpt2, max_slots=0)
    engine = TransformersEngine(gpt2, max_len=8)
    with pytest.raises(InvalidArgument, match="is empty"):
        engine.generate([[]], 2)
    with pytest.raises(InvalidArgument, match="ids must be integers"):
        engine.generate([[100_000]], 2)


def test_gpt2_writes_its_own_data_and_continues_it(tmp_path, capsys):
    folder, output = tmp_path / "gpt2", tmp_path / "data"
    tiny_model("gpt2").save_pretrained(folder)
    save_tokenizer(folder)
    command = ["generate-data", "--model", str(folder), "--output", str(output), "--max-len", "12"]
    main([*command, "--num-records", "6", "--slots", "4", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["records"] == 6 and "transformers" in said.err
    assert len(open_dataset(output)) == 6
    main([*command, "--num-records", "6", "--slots", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["new_records"] == 0
    main(["generate", "--model", str(folder), "--prompt", "a b", "--max-new-tokens", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 3
