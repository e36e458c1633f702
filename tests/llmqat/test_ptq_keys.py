"""Smoothed keys: the same function, planes of equal length, and less lost to 4 bits."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat.convert import state_of
from llmqat.errors import ConfigError
from llmqat.models.families import FAMILIES
from llmqat.ptq import smooth
from llmqat.ptq.keys import PairLengths, check_smoothable_keys, fold_keys, key_scale
from tests.llmqat.tiny import random_tokens, tiny_llama


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


def with_long_keys(**variant):
    """A model one of whose planes of K is fifty times longer than the rest, as real ones have."""
    model = tiny_llama(**variant)
    config = model.config
    scale = torch.ones(config.num_key_value_heads, config.head_dim // 2)
    scale[0, 3] = 1 / 50
    for layer in model.model.layers:
        fold_keys(layer.self_attn, scale, config)
    return model


def lengths_of(model, tokens):
    """The longest pair of every plane, of every block."""
    seen, hooks = [], []
    for layer in model.model.layers:
        lengths = PairLengths(layer.self_attn.k_proj, model.config)
        hook = layer.self_attn.k_proj.register_forward_pre_hook(
            lambda _, args, lengths=lengths: lengths.observe(args[0])
        )
        seen.append(lengths)
        hooks.append(hook)
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return [lengths.largest for lengths in seen]


@pytest.mark.parametrize(
    "variant", [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"bias": True}, {"tied": True}]
)
@pytest.mark.parametrize("folds", ["none", "norms"])
def test_the_float_model_stays_the_same_function(variant, folds):
    tokens = random_tokens(0, 4, 32)
    plain = with_long_keys(**variant)
    smoothed = smooth(with_long_keys(**variant), tokens, folds=folds, key_alpha=1.0)
    assert state_of(smoothed) is None
    changed = {
        name
        for name, p in smoothed.named_parameters()
        if not torch.equal(p, plain.get_parameter(name))
    }
    assert "model.layers.0.self_attn.k_proj.weight" in changed
    assert ("model.layers.0.mlp.up_proj.weight" in changed) is (folds == "norms")
    with torch.no_grad():
        exact = plain.double()(random_tokens(1, 4, 32)).logits
        ours = smoothed.double()(random_tokens(1, 4, 32)).logits
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


def test_with_alpha_one_every_plane_is_equally_long():
    tokens = random_tokens(0, 4, 32)
    for lengths in lengths_of(
        smooth(with_long_keys(), tokens, folds="none", key_alpha=1.0), tokens
    ):
        torch.testing.assert_close(lengths, torch.full_like(lengths, float(lengths.mean())))


def test_keys_lose_less_at_four_bits():
    tokens = random_tokens(0, 4, 32)
    errors = []
    for model in (with_long_keys(), smooth(with_long_keys(), tokens, folds="none", key_alpha=1.0)):
        layer = model.model.layers[0].self_attn
        x = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            keys, queries = layer.k_proj(x), layer.q_proj(x)
            group = model.config.num_attention_heads // model.config.num_key_value_heads
            heads = keys.view(64, -1, model.config.head_dim)
            lost = qk.fake_quantize(keys, 4).view_as(heads) - heads
            products = queries.view(64, -1, group, model.config.head_dim)
            errors.append(torch.einsum("qhgd,khd->hgqk", products, lost).square().mean())
    assert errors[1] < 0.25 * errors[0]


def test_weights_keep_their_grids():
    """A row scaled by a power of two has the same codes: nothing else is quantized differently."""
    layer = tiny_llama(bias=True).model.layers[0].self_attn
    config = tiny_llama(bias=True).config
    before = [qk.quantize(m.weight.detach(), 4)[0] for m in (layer.k_proj, layer.q_proj)]
    planes = config.num_key_value_heads, config.head_dim // 2
    scale = torch.randint(-3, 4, planes, generator=torch.Generator().manual_seed(0)).float().exp2()
    fold_keys(layer, scale, config)
    after = [qk.quantize(m.weight.detach(), 4)[0] for m in (layer.k_proj, layer.q_proj)]
    for codes, scaled in zip(before, after, strict=True):
        assert torch.equal(codes, scaled)


def test_scales_by_hand():
    lengths = torch.tensor([[1.0, 4.0], [16.0, 0.0]])
    torch.testing.assert_close(key_scale(lengths, 1.0), torch.tensor([[0.25, 1.0], [4.0, 1.0]]))
    torch.testing.assert_close(key_scale(lengths, 0.5), torch.tensor([[0.5, 1.0], [2.0, 1.0]]))
    with pytest.raises(ConfigError, match="NaN"):
        key_scale(torch.tensor([[float("nan")]]), 1.0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_other_keys_are_refused(name):
    with pytest.raises(ConfigError, match="key_alpha"):
        check_smoothable_keys(FAMILIES[name])
    with pytest.raises(ConfigError, match="key_alpha: 2"):
        smooth(tiny_llama(), random_tokens(0, 1, 8), key_alpha=2)
