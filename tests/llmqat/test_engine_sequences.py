"""Sequences in the engine: slots, passes, stops, samples, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import llmqat_kernels as qk
from llmqat.errors import ConfigError
from llmqat.runtime import Engine, Request, Sampling, run_requests
from llmqat.runtime.weights import fuse, narrow
from tests.llmqat.test_engine import quantized
from tests.llmqat.tiny import random_tokens, tiny_llama

SETTINGS = ["16-16-16", "8-8-8", "4-8-4", "4-8-16", "4-6-8", "4-16-16", "16-8-16"]


def test_long_prompts_run_in_passes(backend, monkeypatch):
    model = tiny_llama(12)
    prompts = [random_tokens(1, 1, 9)[0].tolist(), random_tokens(2, 1, 5)[0].tolist()]
    whole = Engine(model, max_slots=2, max_len=16).prefill([0, 1], prompts)
    monkeypatch.setattr("llmqat.runtime.engine.ROWS_PER_PASS", 4)
    parts = Engine(model, max_slots=2, max_len=16).prefill([0, 1], prompts)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_slots_are_reused_without_a_trace(backend):
    model = quantized(tiny_llama(13), "4-8-8", "serving")
    engine = Engine(model, max_slots=1, max_len=16)
    first = engine.prefill([0], [[1, 2, 3]])
    engine.prefill([0], [[9, 9, 9, 9, 9, 9]])
    assert torch.equal(engine.prefill([0], [[1, 2, 3]]), first)
    assert engine.length(0) == 3


def test_lossless_bf16_storage(backend):
    model = tiny_llama(14, tied=True)
    wide = Engine(model, max_len=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    stored = Engine(model, max_len=8)
    kept = Engine(model, max_len=8, weight_dtype=torch.float32)
    assert stored.weight_bytes["embedding"] * 2 == wide.weight_bytes["embedding"]
    assert torch.equal(stored.prefill([0], [[1, 2, 3]]), kept.prefill([0], [[1, 2, 3]]))
    assert narrow(torch.tensor([1.0 + 2**-20])).dtype == torch.float32


def test_kv_cache_of_a_plain_model(backend):
    model = tiny_llama(15)
    sizes = {bits: Engine(model, max_len=32, kv_bits=bits).cache_bytes for bits in (4, 8, 16)}
    assert sizes[4] < sizes[8] < sizes[16]
    exact = Engine(model, max_len=32).prefill([0], [[1, 2, 3, 4]])
    close = Engine(model, max_len=32, kv_bits=8, kv_mode="serving").prefill([0], [[1, 2, 3, 4]])
    assert 0 < (close - exact).abs().max() < 0.2 * exact.abs().max()


def test_generate_is_reproducible_and_streams(backend):
    model = tiny_llama(16)
    sampling = Sampling(seed=3, temperature=0.8, top_k=20)
    seen = []
    prompts = [[1, 2], [3], [4, 5, 6]]
    one = Engine(model, max_slots=3, max_len=32).generate(
        prompts, 8, sampling, on_token=lambda record, token: seen.append((record, token))
    )
    two = Engine(model, max_slots=1, max_len=32).generate(prompts, 8, sampling)
    assert [done.tokens for done in one] == [done.tokens for done in two]
    for i, done in enumerate(one):
        assert [token for record, token in seen if record == i] == done.new_tokens
    other = Engine(model, max_len=32).generate(prompts, 8, Sampling(seed=4))
    assert [done.tokens for done in one] != [done.tokens for done in other]


def test_stop_ids_and_lengths(backend):
    model = tiny_llama(17)
    engine = Engine(model, max_slots=2, max_len=12)
    free = engine.generate([[1, 2, 3]], 6)[0]
    stop = free.new_tokens[2]
    done = engine.generate([[1, 2, 3]], 6, stop_ids=[stop])[0]
    assert done.finish_reason == "eos"
    assert done.new_tokens == free.new_tokens[: free.new_tokens.index(stop) + 1]
    assert len(engine.generate([[1] * 10], 50)[0].tokens) == 12
    full = list(run_requests(engine, [Request(0, (1, 2), 2)], Sampling()))
    assert full[0][0].finish_reason == "length" and full[0][0].tokens == [1, 2]


def test_non_finite_logits_end_the_sequence(backend):
    model = tiny_llama(18)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    done = Engine(model, max_slots=2, max_len=16).generate([[1, 7], [1, 2]], 4)
    assert done[0].finish_reason == "error" and done[0].new_tokens == []
    assert done[1].finish_reason in ("length", "error")


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda e: e.prefill([0], [[]]), "is empty"),
        (lambda e: e.prefill([0], [[1] * 9]), "max_len is 8"),
        (lambda e: e.prefill([2], [[1]]), "slots"),
        (lambda e: e.extend([0, 0], [[1], [1]]), "slots"),
        (lambda e: e.decode([128], [0]), "0..127"),
        (lambda e: e.decode([-1], [0]), "0..127"),
        (lambda e: e.extend([0], [[1], [2]]), "one per slot"),
        (lambda e: e.generate([[]], 2), "is empty"),
        (lambda e: e.generate([[1]], 0), "max_new_tokens"),
    ],
)
def test_bad_calls(call, message):
    with qk.use_backend("reference"):
        engine = Engine(tiny_llama(0, layers=1), max_slots=2, max_len=8)
        with pytest.raises(qk.InvalidArgument, match=message):
            call(engine)
        assert engine.prefill([], []).shape == (0, 128)


@pytest.mark.parametrize(
    "options,error",
    [
        ({"max_slots": 0}, qk.InvalidArgument),
        ({"max_slots": 1.5}, qk.InvalidArgument),
        ({"max_len": 513}, qk.InvalidArgument),
        ({"weight_dtype": torch.float16}, qk.InvalidArgument),
        ({"head_bits": 4}, ConfigError),
        ({"kv_bits": 6}, ConfigError),
        ({"kv_bits": 8, "kv_mode": "none"}, ConfigError),
    ],
)
def test_bad_engines(options, error):
    with pytest.raises(error):
        Engine(tiny_llama(0, layers=1), **options)


def test_models_the_engine_refuses():
    with pytest.raises(ConfigError, match="not supported"):
        Engine(torch.nn.Linear(2, 2))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match="RoPE"):
        Engine(tiny_llama(0, layers=1, rope_parameters=dynamic), max_len=8)
    with pytest.raises(ConfigError, match="cannot run"):
        fuse([SimpleNamespace()], torch.float32)
    mixed = tiny_llama(0, layers=1)
    attention = quantized(mixed, "4-8-16").model.layers[0].self_attn
    with pytest.raises(ConfigError, match="differ in bits"):
        fuse([attention.q_proj, mixed.model.layers[0].self_attn.k_proj], torch.float32)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 1.5}, {"temperature": 0.0}, {"top_k": -1}])
def test_bad_sampling(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)
