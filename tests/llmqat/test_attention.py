"""Quantized keys and values in transformers' attention: both modes, caches, masks, gradients."""

import copy

import pytest
import torch
from kv_codes import quantize_kv
from tiny import random_tokens, tiny_llama
from transformers import StaticCache

import llmqat_kernels as qk
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError

MODES = ("paper", "serving")


def seen_by_attention(model, tokens):
    """K and V [B, Hkv, T, D] of the first block as sdpa gets them."""
    from llmqat.models import compat

    seen = []
    real = compat.sdpa_attention_forward

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((key.detach(), value.detach()))
        return real(module, query, key, value, *args, **kwargs)

    from transformers import AttentionInterface

    name = model.config._attn_implementation
    old = compat.sdpa_attention_forward
    compat.sdpa_attention_forward = spy
    registered = AttentionInterface()[name]
    if name == "sdpa":
        AttentionInterface.register("sdpa", spy)
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        compat.sdpa_attention_forward = old
        AttentionInterface.register(name, registered)
    return seen[0]


def rows_on_grid(x, bits):
    """Whether every row of x is its own fake quantization."""
    codes, scale = qk.quantize(x, bits)
    return torch.allclose(codes * scale.unsqueeze(-1), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_serving_quantizes_k_after_rope_and_v_per_token_and_head(bits):
    tokens = random_tokens(0, 2, 9)
    model = tiny_llama(1)
    k, v = seen_by_attention(model, tokens)
    prepared = prepare(model, QATConfig.parse(f"16-16-{bits}", kv_mode="serving"))
    qk_, qv = seen_by_attention(prepared, tokens)
    assert torch.equal(qk_, qk.fake_quantize(k, bits)) and torch.equal(
        qv, qk.fake_quantize(v, bits)
    )
    codes, scale = quantize_kv(k, bits, "serving")
    assert scale.shape == k.shape[:3]
    assert torch.equal(qk.dequantize(codes, scale), qk_)


@pytest.mark.parametrize("bits", [4, 8])
def test_paper_quantizes_before_rope_per_token_over_all_heads(bits):
    tokens = random_tokens(0, 2, 9)
    model = tiny_llama(1)
    _, v = seen_by_attention(model, tokens)
    prepared = prepare(model, QATConfig.parse(f"16-16-{bits}"))
    qk_, qv = seen_by_attention(prepared, tokens)
    codes, scale = quantize_kv(v, bits, "paper")
    b, h, t, d = v.shape
    assert scale.shape == (b, t)
    assert torch.equal(codes * scale[:, None, :, None], qv)
    assert not rows_on_grid(
        qk_.transpose(1, 2).reshape(b, t, h * d), bits
    )  # rotated after the grid
    with torch.no_grad():
        hidden = prepared.model.embed_tokens(tokens)
        block = prepared.model.layers[0]
        k_row = block.self_attn.k_proj(block.input_layernorm(hidden))
    assert rows_on_grid(k_row, bits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_all_training_widths(mode, bits):
    tokens = random_tokens(1, 1, 8)
    logits = [
        prepare(tiny_llama(2), QATConfig.parse(f"16-16-{b}", kv_mode=mode))(tokens).logits
        for b in (bits, 16)
    ]
    assert bool(torch.isfinite(logits[0]).all()) and not torch.equal(*logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [prepare, convert])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate_with_cache_equals_full_forward(mode, stage, implementation):
    """Each key is quantized exactly once, whether it comes from a cache or not."""
    model = tiny_llama(5, attn_implementation=implementation)
    stage(model, QATConfig.parse("4-8-4", kv_mode=mode))
    prompt = random_tokens(2, 3, 7)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **options)
    full = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached, full)
    cache = StaticCache(config=model.config, max_cache_len=40)
    static = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(static, full)


@pytest.mark.parametrize("mode", MODES)
def test_left_padding_does_not_change_a_sequence(mode):
    model = convert(tiny_llama(6), QATConfig.parse("4-8-8", kv_mode=mode))
    prompt = random_tokens(3, 1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(prompt, **options)[:, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 9:], alone)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences(mode):
    """position_ids that restart keep two packed sequences apart."""
    model = prepare(tiny_llama(7), QATConfig.parse("4-8-4", kv_mode=mode))
    a, b = random_tokens(4, 1, 6), random_tokens(5, 1, 8)
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model(torch.cat([a, b], 1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 6:], model(b).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_through_keys_and_values(mode):
    model = prepare(tiny_llama(8), QATConfig.parse("16-16-4", kv_mode=mode)).train()
    model(random_tokens(6, 1, 8)).logits.square().mean().backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        grad = getattr(model.model.layers[0].self_attn, name).weight.grad
        assert bool(grad.any()) and bool(torch.isfinite(grad).all())


def test_a_plain_model_may_use_the_attention_by_name():
    model, tokens = tiny_llama(9), random_tokens(7, 1, 8)
    prepare(copy.deepcopy(model), QATConfig.parse("4-8-4", kv_mode="serving"))
    before = model(tokens).logits
    model.set_attn_implementation("llmqat_sdpa")
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("stage", [prepare, convert])
def test_another_attention_function_is_refused(stage):
    """transformers would run it on keys and values that nothing has quantized."""
    model = stage(tiny_llama(), QATConfig.parse("4-8-4", kv_mode="serving")).eval()
    tokens = random_tokens(3, 1, 7)
    before = model(tokens).logits
    for one in (model, copy.deepcopy(model)):
        one.set_attn_implementation("eager")
        with pytest.raises(ConfigError, match="'eager' would leave keys and values unquantized"):
            one(tokens)
        one.set_attn_implementation("llmqat_sdpa")
        assert torch.equal(one(tokens).logits, before)


@pytest.mark.parametrize("stage", [prepare, convert])
def test_paper_mode_takes_any_attention_function(stage):
    """The projections quantize."""
    model = stage(tiny_llama(), QATConfig.parse("4-8-4")).eval()
    tokens = random_tokens(3, 1, 7)
    before = model(tokens).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(model(tokens).logits, before, atol=1e-4)
