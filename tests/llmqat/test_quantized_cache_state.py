"""What a quantized cache holds after cropping, resetting and refusing; which model it serves."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import llmqat_kernels as qk
from llmqat import QuantizedCache
from llmqat.errors import ConfigError
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.test_engine import quantized
from tests.llmqat.test_quantized_cache import fused, generate
from tests.llmqat.test_quantized_cache_masks import same
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_families import tiny_model


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return fused("4-8-8", "serving")


def fresh(model, ids):
    """Logits of the same tokens through a new cache."""
    return model(ids, past_key_values=QuantizedCache(model, max_len=32)).logits


OTHERS = {
    "rope": lambda: tiny_llama(1, rope_theta=500.0),
    "fewer layers": lambda: tiny_llama(1, layers=1),
    "more layers": lambda: tiny_llama(1, layers=3),
    "heads": lambda: tiny_llama(1, kv_heads=4),
    "head_dim": lambda: tiny_llama(1, head_dim=32),
    "family": lambda: tiny_model("mistral", sliding_window=None, max_position_embeddings=512),
    "kv_mode": lambda: quantized(tiny_llama(1), "16-16-8", "serving"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_of_another_model(on_reference, other):
    """Both models have caches, so that only the check can tell them apart."""
    model, other = tiny_llama(1), OTHERS[other]()
    cache = QuantizedCache(model, max_len=16)
    QuantizedCache(other, max_len=16)
    ids = random_tokens(2, 1, 4)
    with pytest.raises(ConfigError, match="made for another model"):
        other(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    same(model(ids, past_key_values=cache).logits, fresh(model, ids))


def test_copies_of_model_and_cache(on_reference, model):
    """A filled prompt cache may be copied or stored, and serves copies of its model."""
    ids = random_tokens(3, 1, 6)
    cache = QuantizedCache(model, max_len=16)
    model(ids[:, :4], past_key_values=cache)
    stored = io.BytesIO()
    torch.save(cache, stored)
    stored.seek(0)
    caches = [copy.deepcopy(cache), torch.load(stored, weights_only=False), cache]
    for user, own in zip([model, copy.deepcopy(model), copy.deepcopy(model)], caches, strict=True):
        got = user(ids[:, 4:], past_key_values=own).logits
        same(got, fresh(model, ids)[:, 4:])


def test_a_model_that_runs_fewer_blocks(on_reference):
    model = tiny_llama(4, layers=3)
    ids = random_tokens(4, 1, 4)
    whole = QuantizedCache(model, max_len=16)
    model.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match="made for another model"):
        model(ids, past_key_values=whole)
    cache = QuantizedCache(model, max_len=16)
    model(ids[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 2
    same(model(ids[:, 2:], past_key_values=cache).logits, fresh(model, ids)[:, 2:])


def test_reset_and_another_batch(backend, model):
    cache = QuantizedCache(model, max_len=16)
    small = None
    for batch in (2, 4, 2, 1):
        ids = random_tokens(5, batch, 5)
        expected = generate(model, ids, QuantizedCache(model, max_len=16), 3)
        assert torch.equal(generate(model, ids, cache, 3), expected)
        small = cache.nbytes if small is None else small
        assert cache.nbytes == small * batch // 2
        cache.reset()
    ids = random_tokens(5, 3, 5)
    model(ids[:1], past_key_values=cache)
    cache.crop(-5)
    same(model(ids, past_key_values=cache).logits, fresh(model, ids))


def test_a_store_is_used_again(on_reference, model):
    cache = QuantizedCache(model, max_len=16)
    model(random_tokens(6, 2, 5), past_key_values=cache)
    stores = [layer.store for layer in cache.layers]
    cache.reset()
    model(random_tokens(7, 2, 3), past_key_values=cache)
    assert all(layer.store is old for layer, old in zip(cache.layers, stores, strict=True))


REFUSED = {
    "tokens": (9, {}, "12 tokens, max_len is 8"),
    "positions": (2, {"position_ids": torch.tensor([[4, 5]])}, "position_ids"),
    "mask": (2, {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}, "attention_mask"),
    "batch": (2, {}, "holds 2 sequences"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_chunk_changes_nothing(on_reference, model, why):
    length, options, message = REFUSED[why]
    ids = random_tokens(8, 2, 5)
    cache = QuantizedCache(model, max_len=8)
    model(ids[:, :3], past_key_values=cache)
    chunk = random_tokens(9, 1 if why == "batch" else 2, length)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=message):
            model(chunk, past_key_values=cache, **options)
    assert cache.get_seq_length() == 3
    same(model(ids[:, 3:], past_key_values=cache).logits, fresh(model, ids)[:, 3:])


@pytest.mark.parametrize("layer", [0, 1])
def test_a_failed_forward_changes_nothing(on_reference, model, layer, monkeypatch):
    """Memory runs out, or a key is pressed, in the middle of a forward."""
    ids = random_tokens(8, 2, 5)
    cache = QuantizedCache(model, max_len=8)
    model(ids[:, :3], past_key_values=cache)
    with monkeypatch.context() as patch:
        left = [qk.attention_decode] * layer
        patch.setattr(qk, "attention_decode", lambda *a, **b: left.pop()(*a, **b))
        with pytest.raises(IndexError):
            model(random_tokens(9, 2, 2), past_key_values=cache)
    assert cache.get_seq_length() == 3
    same(model(ids[:, 3:], past_key_values=cache).logits, fresh(model, ids)[:, 3:])


@pytest.mark.parametrize("removed", [-7, -100])
def test_cropping_everything(on_reference, model, removed):
    cache = QuantizedCache(model, max_len=16)
    ids = random_tokens(10, 2, 7)
    model(ids, past_key_values=cache)
    cache.crop(removed)
    assert cache.get_seq_length() == 0 and cache._real.sum(1).tolist() == [0, 0]
    same(model(ids, past_key_values=cache).logits, fresh(model, ids))


@pytest.mark.parametrize("kept,left", [(100, 7), (7, 7), (0, 7), (6, 6), (1, 1)])
def test_cropping_to_a_length(on_reference, model, kept, left):
    """The older form; as in transformers' own caches 0 removes nothing."""
    cache = QuantizedCache(model, max_len=16)
    model(random_tokens(10, 2, 7), past_key_values=cache)
    cache.crop(kept)
    assert cache.get_seq_length() == left and cache._real.sum(1).tolist() == [left] * 2


CROPS = [
    ([1, 1, 1, 0, 0], -2, 3),
    ([1, 1, 1, 0, 0], -1, 3),
    ([1, 1, 1, 0, 0], -4, 1),
    ([0, 0, 1, 1, 1], -2, 1),
    ([0, 0, 1, 1, 1], -4, 0),
    ([1, 0, 1, 0, 1], -3, 1),
]


@pytest.mark.parametrize("short,removed,left", CROPS)
def test_cropping_removes_columns(on_reference, model, short, removed, left):
    """Of a padded sequence only the tokens in those columns go, whatever the side."""
    ids, mask = random_tokens(11, 2, 5), torch.tensor([short, [1] * 5])
    cache = QuantizedCache(model, max_len=16)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.crop(removed)
    assert cache.get_seq_length() == 5 + removed
    assert cache._real.sum(1).tolist() == [left, 5 + removed]
    new = random_tokens(12, 2, 2)
    got = model(
        new,
        attention_mask=torch.cat((mask[:, :removed], torch.ones(2, 2, dtype=torch.int64)), dim=1),
        position_ids=torch.tensor([[left], [5 + removed]]) + torch.arange(2),
        past_key_values=cache,
    ).logits
    for row in range(2):
        tokens = ids[row, :removed][mask[row, :removed].bool()]
        whole = torch.cat((tokens, new[row]))[None]
        same(got[row], fresh(model, whole)[0, -2:])


def test_right_padding_cropped_away_needs_no_mask(on_reference, model):
    ids, mask = random_tokens(13, 2, 5), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    cache = QuantizedCache(model, max_len=16)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-2)
    whole = torch.cat((ids[:, :3], random_tokens(14, 2, 2)), dim=1)
    got = model(whole[:, 3:], past_key_values=cache).logits
    same(got, fresh(model, whole)[:, 3:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch,length", [(0, 4), (2, 0)])
def test_nothing_to_do(on_reference, batch, length, attention):
    model = tiny_llama(15)
    model.set_attn_implementation(attention)
    cache = QuantizedCache(model, max_len=16)
    message = f"input_ids: {batch} sequences of {length} new tokens"
    with pytest.raises(InvalidArgument, match=message):
        model(random_tokens(16, 2, 4)[:batch, :length], past_key_values=cache)
    model(random_tokens(16, 2, 4), past_key_values=cache)
    with pytest.raises(InvalidArgument, match=message):
        model(random_tokens(16, 2, 4)[:batch, :length], past_key_values=cache)
    assert cache.get_seq_length() == 4
