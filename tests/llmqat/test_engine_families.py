"""The engine on every family: what transformers computes, or an error in one line."""

import pytest
import torch
from tiny import random_tokens
from tiny_families import tiny_model

from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError
from llmqat.runtime.engine import Engine
from llmqat_kernels.errors import InvalidArgument

FIELDS = {"llama": {}, "mistral": {"sliding_window": 64}, "qwen2": {}, "qwen3": {}}


def engine_logits(engine, tokens):
    """Logits [T, V] of one sequence, one token at a time."""
    return torch.stack([engine.decode([token], [0])[0] for token in tokens[0].tolist()])


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("name", FIELDS)
def test_plain_equals_transformers(name, mode, backend):
    model, x = tiny_model(name, **FIELDS[name]), random_tokens(0, 1, 12)
    with torch.no_grad():
        expected = model(x).logits[0]
    got = engine_logits(Engine(model, kv_mode=mode, max_len=16), x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("setting", ["8-8-8", "4-16-4"])
def test_quantized_follows_transformers(name, mode, setting, backend):
    model = tiny_model(name, 1, **FIELDS[name])
    convert(prepare(model, QATConfig.parse(setting, kv_mode=mode)))
    x = random_tokens(1, 1, 16)
    if name == "qwen3" and mode == "paper":
        with pytest.raises(ConfigError, match=r"kv_mode: paper .* use kv_mode serving"):
            Engine(model, max_len=16)
        return
    with torch.no_grad():
        expected = model(x).logits[0]
    got = engine_logits(Engine(model, max_len=16), x)
    # A code that flips at a tie costs a step of its grid, as in test_engine.
    assert (got - expected).abs().max() < 0.2 * expected.abs().max()
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_windows_are_refused_where_they_would_cut(name):
    fields = {"use_sliding_window": True, "max_window_layers": 1} if name == "qwen2" else {}
    model = tiny_model(name, sliding_window=8, **fields)
    with pytest.raises(InvalidArgument, match=r"max_len: 9 .* sliding window of 8"):
        Engine(model, max_len=9)
    engine, x = Engine(model), random_tokens(2, 1, 8)
    assert engine.max_len == 8
    with torch.no_grad():
        expected = model(x).logits[0]
    torch.testing.assert_close(engine_logits(engine, x), expected, rtol=1e-3, atol=1e-3)


def test_gpt2_is_refused():
    with pytest.raises(ConfigError, match="engine does not run GPT2LMHeadModel"):
        Engine(tiny_model("gpt2"))
