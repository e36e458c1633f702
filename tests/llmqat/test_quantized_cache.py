"""transformers' generate over the quantized cache: the engine's codes, and what generate can ask
of a cache.
"""

from __future__ import annotations

import copy

import pytest
import torch

import llmqat
from llmqat import QATConfig, QuantizedCache, convert, prepare
from llmqat.errors import ConfigError
from llmqat.runtime import Engine
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.test_engine import quantized
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_families import tiny_model

CASES = [("4-8-8", "paper"), ("4-8-4", "serving"), ("8-8-4", "paper"), ("8-8-16", "serving")]


def fused(setting, mode, seed=61, **fields):
    """A converted model whose norms and products are the engine's own bits."""
    model = prepare(tiny_llama(seed, **fields), QATConfig.parse(setting, kv_mode=mode), fused=True)
    return convert(model)


def generate(model, ids, cache=None, new=12, mask=None, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


def same_store(layer, cache, slots, length):
    """Whether both hold the same codes and scales in the first `length` tokens."""
    for name in ("k_codes", "v_codes"):
        a, b = (getattr(c, name)[slots, :, :length] for c in (layer.store, cache))
        assert torch.equal(a, b), name
    for name in ("k_scale", "v_scale"):
        a, b = (getattr(c, name) for c in (layer.store, cache))
        if a.numel():
            assert torch.equal(a[slots, ..., :length], b[slots, ..., :length]), name


@pytest.mark.parametrize("setting,mode", CASES)
def test_tokens_and_codes_are_the_engines(on_reference, setting, mode):
    model = fused(setting, mode)
    ids = random_tokens(62, 2, 7)
    engine = Engine(model, max_slots=2, max_len=24)
    expected = [done.tokens for done in engine.generate(ids.tolist(), 12)]
    cache = QuantizedCache(model, max_len=24)
    assert generate(model, ids, cache).tolist() == expected
    assert cache.nbytes == engine.cache_bytes and cache.get_seq_length() == 18
    for layer, own in zip(cache.layers, engine.caches, strict=True):
        assert layer.store.k_codes.dtype == own.k_codes.dtype
        same_store(layer, own, slice(2), 18)


@pytest.mark.parametrize("setting,mode,stage", [(*CASES[0], "converted"), (*CASES[1], "prepared")])
def test_other_models_agree_with_their_own_cache(backend, setting, mode, stage):
    """Norms and attention round differently: spec 9 and the tolerance of test_engine."""
    model = quantized(tiny_llama(63), setting, mode, packed=stage == "converted")
    ids = random_tokens(64, 3, 6)
    expected = generate(model, ids)
    got = generate(model, ids, QuantizedCache(model, max_len=24))
    assert (got == expected).float().mean() > 0.8
    assert torch.equal(generate(model, ids), expected)  # other caches work as before
    with torch.no_grad():
        cache = QuantizedCache(model, max_len=24)
        logits = model(ids, past_key_values=cache).logits
        assert (logits.argmax(-1) == model(ids).logits.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_other_families(on_reference, name):
    model = convert(tiny_model(name), QATConfig.parse("8-8-8", kv_mode="serving"))
    ids = random_tokens(65, 2, 5, 64)
    expected = generate(model, ids, new=3)
    got = generate(model, ids, QuantizedCache(model), new=3)
    assert (got == expected).float().mean() > 0.8


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches(on_reference, mode, attention):
    model = fused("4-8-8", mode)
    if mode == "paper":
        model.set_attn_implementation(attention)
    short, long = [5, 6, 7], [9, 8, 7, 6, 5]
    alone = [
        generate(model, torch.tensor([p]), QuantizedCache(model, max_len=16), 6)[0, len(p) :]
        for p in (short, long)
    ]
    ids = torch.tensor([[0, 0, *short], long])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    cache = QuantizedCache(model, max_len=16)
    got = generate(model, ids, cache, 6, mask)[:, 5:]
    assert torch.equal(got, torch.stack(alone))
    assert cache._real.sum(1).tolist() == [8, 10]


def test_beams_contrast_and_reuse(on_reference):
    model = fused("4-8-8", "paper")
    ids = random_tokens(66, 2, 4)
    expected = generate(model, ids, num_beams=3, new=6)
    cache = QuantizedCache(model, max_len=16)
    assert (generate(model, ids, cache, num_beams=3, new=6) == expected).float().mean() > 0.8
    cache = QuantizedCache(model, max_len=16)
    first = generate(model, ids, cache)
    cache.reset()
    assert torch.equal(generate(model, ids, cache), first)


def test_crop_and_selection(on_reference):
    model = fused("4-8-4", "serving")
    ids = random_tokens(67, 2, 8)
    cache = QuantizedCache(model, max_len=16)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == 8
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, expected)
        cache.crop(8)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        again = model(ids[1:, :1].expand(2, 1), past_key_values=cache).logits
        assert torch.equal(again[0], expected[1]) and torch.equal(again[1], expected[1])


def test_several_turns(on_reference):
    """A cache filled by one call and continued by the next."""
    model = fused("8-8-8", "paper")
    ids = random_tokens(68, 1, 5)
    whole = generate(model, ids, QuantizedCache(model, max_len=32), 10)
    cache = QuantizedCache(model, max_len=32)
    part = generate(model, ids, cache, 4)
    assert torch.equal(generate(model, part, cache, 6), whole)


def test_what_is_refused(on_reference):
    model = fused("4-8-8", "paper")
    ids = random_tokens(69, 1, 6)
    with pytest.raises(InvalidArgument, match="max_len is 8"):
        generate(model, ids, QuantizedCache(model, max_len=8), 6)
    with pytest.raises(InvalidArgument, match="outside 1"):
        QuantizedCache(model, max_len=513)
    with pytest.raises(ConfigError, match="kv_bits"):
        QuantizedCache(model, kv_bits=6)
    with pytest.raises(ConfigError, match="kv_mode"):
        QuantizedCache(model, kv_mode="none")
    with pytest.raises(ConfigError, match="made for another model"), torch.no_grad():
        tiny_llama(61)(ids, past_key_values=QuantizedCache(model, max_len=8))
    cache = QuantizedCache(model, max_len=8)
    with torch.no_grad():
        with pytest.raises(InvalidArgument, match="position_ids"):
            model(ids, past_key_values=cache, position_ids=torch.arange(1, 7)[None])
        cache.reset()
        model(ids, past_key_values=cache)
        with pytest.raises(InvalidArgument, match="holds 1 sequences"):
            model(ids[:, :1].expand(2, 1), past_key_values=cache)
    with pytest.raises(ConfigError, match="no RoPE"):
        QuantizedCache(tiny_model("gpt2"))


def test_a_plain_model_and_a_copy(on_reference):
    model = tiny_llama(70)
    ids = random_tokens(71, 1, 6)
    expected = generate(model, ids)
    cache = llmqat.QuantizedCache(model)
    assert (cache.bits, cache.mode, cache.max_len) == (16, "paper", 512)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(model, ids, cache), expected)
    assert torch.equal(generate(twin, ids), expected)
    with torch.no_grad():
        exact = twin(ids).logits
        small = QuantizedCache(twin, kv_bits=8, kv_mode="serving", max_len=8)
        close = twin(ids, past_key_values=small).logits
    assert 0 < (close - exact).abs().max() < 0.2 * exact.abs().max()
