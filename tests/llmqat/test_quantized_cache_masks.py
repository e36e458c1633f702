"""Which attention masks the quantized cache takes: causal ones over padded batches, nothing else,
and what a mask says about cached columns has to be what the cache holds.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from llmqat import QuantizedCache
from llmqat.errors import ConfigError
from llmqat_kernels import native, use_backend
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.host_syncs import no_host_syncs
from tests.llmqat.test_quantized_cache import fused, generate
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_families import tiny_model

T = 5
ONLY_CAUSAL = "attention_mask: only causal attention over padded batches"
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _without_gradients(on_reference):
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return fused("4-8-8", "serving")


def same(logits, expected):
    """Other codes would show; products of other numbers of rows may round the last bits apart."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def causal():
    return torch.ones(T, T, dtype=torch.bool).tril()[None, None]


def added(mask, low=LOWEST):
    """The float mask that hides the same columns."""
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def hide_one(mask):
    mask[..., 3:, 1] = False


def hide_itself(mask):
    mask[..., 2, 2] = False


def show_the_future(mask):
    mask[..., 1, 4] = True


def narrow(mask):
    mask &= torch.ones(T, T, dtype=torch.bool).triu(-2)


def one_head(mask):
    mask[:, 1, 3:, 1] = False


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("edit", [hide_one, hide_itself, show_the_future, narrow, one_head])
def test_other_patterns_are_refused(model, edit, kind):
    mask = causal().repeat(1, 4, 1, 1)
    edit(mask)
    ids = random_tokens(1, 1, T)
    cache = QuantizedCache(model, max_len=16)
    with pytest.raises(InvalidArgument, match=ONLY_CAUSAL):
        model(ids, attention_mask=mask if kind == "bool" else added(mask), past_key_values=cache)
    assert cache.get_seq_length() == 0
    expected = model(ids, past_key_values=QuantizedCache(model, max_len=16)).logits
    same(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("step", [0.5, -0.5, float("nan")])
def test_a_bias_is_refused(model, step):
    """Neither 0 nor so low that nothing is left: also where it is all that one token sees."""
    ids = random_tokens(1, 1, T)
    for place in [(3, 1), (2, 2)]:
        mask = added(causal())
        mask[0, 0][place] = step
        with pytest.raises(InvalidArgument, match=ONLY_CAUSAL):
            model(ids, attention_mask=mask, past_key_values=QuantizedCache(model, max_len=16))


@pytest.mark.parametrize(
    "mask",
    [causal(), added(causal()), added(causal(), -torch.inf), added(causal(), -1e4).bfloat16()],
)
def test_causal_masks_are_taken(model, mask):
    ids = random_tokens(1, 2, T)
    expected = model(ids, past_key_values=QuantizedCache(model, max_len=16)).logits
    for given in (mask, mask.repeat(2, 4, 1, 1)):
        cache = QuantizedCache(model, max_len=16)
        got = model(ids, attention_mask=given, past_key_values=cache).logits
        same(got, expected)
        assert cache._real.all()


@pytest.mark.parametrize("shape", [(1, 1, T, T + 1), (3, 1, T, T), (1, 1, 1, T)])
def test_other_shapes_are_refused(model, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match=r"attention_mask: shape .* is not \[2, 1, 5, 5\]"):
        model(
            random_tokens(1, 2, T),
            attention_mask=mask,
            past_key_values=QuantizedCache(model, max_len=16),
        )


def test_a_token_cannot_be_hidden_later(model):
    ids = random_tokens(2, 1, 6)
    cache = QuantizedCache(model, max_len=16)
    model(ids[:, :4], past_key_values=cache)
    for length in (1, 2):
        mask = torch.ones(1, 4 + length, dtype=torch.int64)
        mask[0, 1] = 0
        with pytest.raises(InvalidArgument, match=ONLY_CAUSAL):
            model(ids[:, 4 : 4 + length], attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 4
    expected = model(ids, past_key_values=QuantizedCache(model, max_len=16)).logits[:, 4:]
    mask = torch.ones(1, 6, dtype=torch.int64)
    same(model(ids[:, 4:], attention_mask=mask, past_key_values=cache).logits, expected)


def test_a_mask_of_the_new_tokens_alone(model):
    """transformers reads it as the mask of the first tokens: the new ones would all be padding."""
    ids = random_tokens(2, 1, 6)
    cache = QuantizedCache(model, max_len=16)
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(InvalidArgument, match="attention_mask: it hides every new token"):
        model(ids[:, 4:], attention_mask=torch.ones(1, 2), past_key_values=cache)


PADDINGS = {"left": [[0, 0, 1, 1, 1], [1] * 5], "right": [[1, 1, 1, 0, 0], [1] * 5]}


def padded(model, side, cache):
    """Two prompts of 3 and 5 tokens in a cache; those prompts, and the mask."""
    mask = torch.tensor(PADDINGS[side])
    ids = random_tokens(3, 2, 5)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)], mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("side", PADDINGS)
def test_padding_stays_hidden(side, length, attention):
    model = fused("4-8-8", "serving")
    model.set_attn_implementation(attention)
    cache = QuantizedCache(model, max_len=16)
    prompts, mask = padded(model, side, cache)
    new = random_tokens(4, 2, length)
    where = {"position_ids": torch.tensor([[3], [5]]) + torch.arange(length)}
    wrong = [torch.ones(2, 5 + length, dtype=torch.int64)]
    wrong += [None] if attention == "sdpa" else []
    for given in wrong:
        with pytest.raises(InvalidArgument, match=ONLY_CAUSAL):
            model(new, attention_mask=given, past_key_values=cache, **where)
    mask = torch.cat((mask, torch.ones(2, length, dtype=torch.int64)), dim=1)
    got = model(new, attention_mask=mask, past_key_values=cache, **where).logits
    for row, prompt in enumerate(prompts):
        whole = torch.cat((prompt, new[row]))[None]
        alone = model(whole, past_key_values=QuantizedCache(model, max_len=16)).logits
        same(got[row], alone[0, -length:])


def test_masks_follow_what_is_done_to_a_cache(model):
    """Selected, repeated and cropped sequences keep their own padding."""
    cache = QuantizedCache(model, max_len=16)
    prompts, mask = padded(model, "left", cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    mask = torch.cat((mask[[1, 1, 0, 0], :4], torch.ones(4, 2, dtype=torch.int64)), dim=1)
    new = random_tokens(5, 1, 2).expand(4, 2)
    where = {"position_ids": torch.tensor([[4], [4], [2], [2]]) + torch.arange(2)}
    with pytest.raises(InvalidArgument, match=ONLY_CAUSAL):
        model(new, attention_mask=mask.flip(0), past_key_values=cache, **where)
    got = model(new, attention_mask=mask, past_key_values=cache, **where).logits
    for rows, prompt in ((got[:2], prompts[1]), (got[2:], prompts[0])):
        whole = torch.cat((prompt[:-1], new[0]))[None]
        alone = model(whole, past_key_values=QuantizedCache(model, max_len=16)).logits[0, -2:]
        same(rows, alone.expand(2, -1, -1))
    cache.batch_select_indices(torch.tensor([0]))  # the sequence without padding needs no mask
    model(new[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("lengths", [(3, 6), (2, 3)])
def test_a_prompt_in_chunks(model, lengths):
    """The first chunk of the short sequence, or of both, is padding alone."""
    ids = random_tokens(6, 2, 6)
    mask = torch.tensor([[0] * (6 - length) + [1] * length for length in lengths])
    whole = generate(model, ids, QuantizedCache(model, max_len=16), 4, mask)
    cache = QuantizedCache(model, max_len=16)
    assert torch.equal(generate(model, ids, cache, 4, mask, prefill_chunk_size=2), whole)


WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
}
"""In Qwen2 each kind of layer has its own mask; here the second layer's is the one with a window.
"""


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_may_hide_padding_only(name):
    model = tiny_model(name, **WINDOWS[name])
    ids, positions = random_tokens(7, 1, 8), torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3]])
    new = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[4]])}
    right = torch.tensor([[1] * 4 + [0] * 4])
    cache = QuantizedCache(model)
    model(ids, attention_mask=right, position_ids=positions, past_key_values=cache)
    with pytest.raises(InvalidArgument, match=ONLY_CAUSAL):
        mask = torch.tensor([[1] * 4 + [0] * 4 + [1]])
        model(**new, attention_mask=mask, past_key_values=cache)
    assert {layer.seen for layer in cache.layers} == {8}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_over_left_padding(name):
    model = tiny_model(name, **WINDOWS[name])
    prompt = random_tokens(8, 1, 4)
    mask = torch.tensor([[0] * 4 + [1] * 4])
    ids = torch.cat((torch.zeros_like(prompt), prompt), dim=1)
    got = generate(model, ids, QuantizedCache(model), 4, mask)[:, 8:]
    assert torch.equal(got, generate(model, prompt, QuantizedCache(model), 4)[:, 4:])


def test_other_attention_functions():
    """flex_attention has masks of its own, flash attention two dimensions."""
    model = tiny_llama(9)
    ids = random_tokens(9, 1, T)
    block = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cpu")
    with pytest.raises(ConfigError, match=r"attn_implementation: .* not BlockMask"):
        model(ids, attention_mask=block, past_key_values=QuantizedCache(model))
    cache = QuantizedCache(model)
    with pytest.raises(ConfigError, match=r"attn_implementation: .* not a 2-D mask"):
        model.model.layers[0].self_attn(
            torch.zeros(1, T, 64), attention_mask=torch.ones(1, T), past_key_values=cache
        )


def test_only_the_first_layer_waits_for_a_value(monkeypatch):
    """And it waits once, where nothing is padding."""
    if not native.is_available():
        pytest.skip(native.why_not())
    attend, reads = QuantizedCache.attend, []

    def watched(self, index, *args):
        if index == 0:
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", counted)
                return attend(self, index, *args)
        with no_host_syncs():
            return attend(self, index, *args)

    def counted(tensor, tolist=torch.Tensor.tolist):
        reads.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(QuantizedCache, "attend", watched)
    with use_backend("cpu"):
        model = fused("4-8-8", "serving", layers=3)
        model.set_attn_implementation("eager")  # a mask in every step
        generate(model, random_tokens(10, 2, 4), QuantizedCache(model, max_len=16), 3)
    assert len(reads) == 3
