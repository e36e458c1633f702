"""Calibration: which tokens, what each linear is shown, and which mistakes are refused."""

import json

import pytest
import torch

import llmqat_kernels as qk
from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError, DataError, LockError
from llmqat.ptq import BlockJournal, calibration_tokens
from llmqat.ptq.calibration import BlockWalk, Gram, fingerprint, token_weights
from tests.llmqat.tiny import random_tokens, tiny_llama


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


@pytest.fixture
def data(tmp_path):
    """100 rows of 16 ids in a jsonl file."""
    path = tmp_path / "data.jsonl"
    rows = random_tokens(5, 100, 16).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def test_tokens_are_drawn_with_a_seed(data):
    first = calibration_tokens(data, sequences=7, seq_len=24, seed=3)
    assert first.shape == (7, 24) and first.dtype == torch.int64
    assert torch.equal(first, calibration_tokens(data, sequences=7, seq_len=24, seed=3))
    assert not torch.equal(first, calibration_tokens(data, sequences=7, seq_len=24, seed=4))
    assert len(torch.unique(first, dim=0)) == 7
    whole = calibration_tokens(data, sequences=1000, seq_len=24, seed=3)
    assert whole.shape == (100 * 16 // 24, 24)


def test_several_files_and_text(data, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("a b c d " * 8)

    class Words:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(word) for word in each.split()] for each in texts]}

    both = calibration_tokens([data, text], seq_len=16, sequences=1000, tokenizer=Words())
    assert both.shape == (102, 16)
    assert calibration_tokens(text, seq_len=16, tokenizer=Words()).shape == (2, 16)


def test_bad_arguments(data, tmp_path):
    for options, message in (
        ({"sequences": 0}, "sequences: 0"),
        ({"seq_len": 1}, "seq_len: 1"),
        ({"seed": -1}, "seed: -1"),
        ({"sequences": True}, "sequences: True"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibration_tokens(data, **options)
    with pytest.raises(DataError, match="less than one block"):
        calibration_tokens(data, seq_len=4096)
    with pytest.raises(DataError, match="does not exist"):
        calibration_tokens(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="vocab_size 8"):
        calibration_tokens(data, vocab_size=8, seq_len=16)


@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_walk_equals_the_model(mode):
    """Hidden states after the last block are the model's own, also when everything is quantized."""
    model = prepare(tiny_llama(layers=3), QATConfig.parse("4-8-4", kv_mode=mode))
    tokens = random_tokens(0, 5, 12)
    walk = BlockWalk(model, tokens, batch_size=2)
    assert [hidden.shape[0] for hidden in walk.hidden] == [2, 2, 1]
    for index, name, block in walk:
        assert name == f"model.layers.{index}"
        outputs = walk.run(block)
        walk.advance(block, outputs)
    with torch.no_grad():
        expected = [model.model(input_ids=batch).last_hidden_state for batch in tokens.split(2)]
        for ours, theirs in zip(outputs, expected, strict=True):
            assert torch.equal(model.model.norm(ours), theirs)


def test_inputs_are_what_the_linear_gets():
    model, tokens = tiny_llama(), random_tokens(0, 4, 12)
    seen = {}
    names = ("self_attn.o_proj", "mlp.down_proj")
    for short in names:
        module = model.model.layers[1].get_submodule(short)
        module.register_forward_pre_hook(
            lambda _, args, short=short: seen.setdefault(short, []).append(args[0])
        )
    with torch.no_grad():
        for batch in tokens.split(2):
            model(input_ids=batch)
    expected = {short: list(seen[short]) for short in names}
    walk = BlockWalk(model, tokens, batch_size=2)
    walk.advance(model.model.layers[0])
    block = model.model.layers[1]
    observed = {short: [] for short in names}
    walk.run(block, {short: observed[short].append for short in names})
    for short in names:
        for found in (list(walk.inputs(block, short)), observed[short]):
            assert all(torch.equal(a, b) for a, b in zip(found, expected[short], strict=True))


def test_a_pass_ends_at_the_linear_and_leaves_no_hook():
    model = tiny_llama()
    block = model.model.layers[0]
    calls = []
    handle = block.mlp.register_forward_hook(lambda *_: calls.append(1))
    walk = BlockWalk(model, random_tokens(0, 2, 8))
    assert len(list(walk.inputs(block, "self_attn.o_proj"))) == 1
    assert not calls
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gram():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    gram = Gram.of(iter([x[:2], x[2:]]), "here")
    rows = x.reshape(-1, 7).double()
    assert torch.allclose(gram.matrix, rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert torch.allclose(gram.mean_magnitude, rows.abs().mean(0), rtol=1e-6)
    assert gram.tokens == 15
    x[0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"here: .*NaN"):
        Gram.of(iter([x]), "here")


def test_token_weights():
    x = torch.zeros(1, 5, 4)
    x[0, :, 0] = torch.tensor([1.0, 1.0, -1.0, 3.0, 100.0])
    weights = token_weights(x, 2.0)
    assert torch.equal(weights, torch.tensor([1.0, 1.0, 1.0, 2 / 3, 0.02]).view(1, 5, 1))
    assert torch.equal(token_weights(x, 0), torch.ones(1, 5, 1))
    # A median of zero (mostly empty tokens) limits nothing.
    x[0, :3] = 0
    assert torch.equal(token_weights(x, 2.0), torch.ones(1, 5, 1))
    gram = Gram.of(iter([torch.tensor([[1.0], [1.0], [50.0]])]), "here", 3.0)
    assert float(gram.matrix) == pytest.approx(1 + 1 + 9)


def test_walk_refuses():
    model = tiny_llama()
    for tokens, message in (
        (torch.full((1, 4), 128), r"vocabulary is \[0, 128\)"),
        (torch.zeros(1, 4), "int64"),
        (torch.zeros(4, dtype=torch.int64), "int64"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least one"),
        (torch.zeros(1, 513, dtype=torch.int64), "512 positions"),
    ):
        with pytest.raises(DataError, match=message):
            BlockWalk(model, tokens)
    with pytest.raises(ConfigError, match="batch_size: 0"):
        BlockWalk(model, random_tokens(0, 1, 4), batch_size=0)


def test_fingerprint_sees_weights_and_tokens():
    model, tokens = tiny_llama(), random_tokens(0, 2, 8)
    first = fingerprint(model, tokens)
    assert first == fingerprint(tiny_llama(), tokens.clone())
    assert first != fingerprint(model, tokens + 1)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert first != fingerprint(model, tokens)
    fingerprint(tiny_llama(dtype=torch.bfloat16), tokens)


def test_journal(tmp_path):
    folder = tmp_path / "run"
    tensors = {"a": torch.arange(4), "b": torch.ones(2, 2).T}
    with BlockJournal(folder, {"x": 1}, resume=True) as journal:
        assert journal.load(0) is None
        journal.save(0, tensors)
        with pytest.raises(LockError), BlockJournal(folder, {"x": 1}, resume=True):
            pass
    with BlockJournal(folder, {"x": 1}, resume=True) as journal:
        found = journal.load(0)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with (
        pytest.raises(ConfigError, match="another x"),
        BlockJournal(folder, {"x": 2}, resume=True),
    ):
        pass
    (folder / "block-00000.safetensors").write_bytes(b"short")
    with BlockJournal(folder, {"x": 1}, resume=True) as journal:
        with pytest.raises(ConfigError, match="damaged"):
            journal.load(0)
    with BlockJournal(folder, {"x": 2}, resume=False) as journal:
        assert journal.load(0) is None
        journal.remove()
    assert not folder.exists()
