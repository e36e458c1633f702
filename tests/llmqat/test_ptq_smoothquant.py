"""Channel migration: the float model stays the same function; ranges move as the formula says."""

import copy

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare, state_of
from llmqat.errors import ConfigError, DataError
from llmqat.models.families import FAMILIES
from llmqat.ptq import smooth, smoothquant
from llmqat.ptq.channels import FOLDS, InputGroup, fold, input_groups
from llmqat.ptq.smoothquant import smoothing_scale
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("8-8-8")


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


def spiky(seed=0, **variant):
    """A model whose norms enlarge three channels, as real ones do."""
    model = tiny_llama(seed, **variant)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] *= 30
            layer.post_attention_layernorm.weight[9] *= 40
            layer.mlp.up_proj.weight[11] *= 20
    return model


@pytest.mark.parametrize("folds", [name for name in FOLDS if name != "none"])
@pytest.mark.parametrize(
    "variant", [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"bias": True}, {"tied": True}]
)
def test_the_float_model_stays_the_same_function(folds, variant):
    tokens = random_tokens(0, 4, 32)
    plain = spiky(**variant).double()
    smoothed = smooth(spiky(**variant), tokens, folds=folds)
    assert state_of(smoothed) is None
    assert list(smoothed.state_dict()) == list(plain.state_dict())
    changed = {
        name
        for name, p in smoothed.named_parameters()
        if not torch.equal(p.double(), plain.get_parameter(name))
    }
    assert "model.layers.1.self_attn.q_proj.weight" in changed
    for short, fold_name in (("mlp.down_proj", "norms+down"), ("self_attn.o_proj", "all")):
        order = list(FOLDS)
        expected = order.index(folds) >= order.index(fold_name)
        assert (f"model.layers.0.{short}.weight" in changed) is expected
    with torch.no_grad():
        exact = plain(random_tokens(1, 4, 32)).logits
        float32 = spiky(**variant)(random_tokens(1, 4, 32)).logits.double()
        ours = smoothed(random_tokens(1, 4, 32)).logits.double()
    rounding = (float32 - exact).abs().max()
    assert (ours - exact).abs().max() < 4 * rounding + 1e-6


@pytest.mark.parametrize("config", [(4, 2), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("group", input_groups(FAMILIES["llama"]), ids=lambda g: g.linears[-1])
def test_folding_by_powers_of_two_is_exact(config, group: InputGroup):
    """Multiplying by powers of two rounds nothing: the outputs must agree to the last bit."""
    heads, kv_heads = config
    plain = tiny_llama(heads=heads, kv_heads=kv_heads, bias=True)
    model = copy.deepcopy(plain)
    block = model.model.layers[0]
    channels = block.get_submodule(group.linears[0]).in_features
    if group.kind == "values":
        channels = kv_heads * 16
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(-3, 4, (channels,), generator=generator).float().exp2()
    fold(block, group, scale, model.config)
    with torch.no_grad():
        tokens = random_tokens(0, 2, 16)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not torch.equal(
        block.get_submodule(group.linears[0]).weight,
        plain.model.layers[0].get_submodule(group.linears[0]).weight,
    )


def test_formula():
    x, w = torch.tensor([4.0, 9.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert torch.equal(smoothing_scale(x, w, 0.5), torch.tensor([2.0, 1.5, 1.0, 1.0]))
    assert torch.equal(smoothing_scale(x, w, 1.0), torch.tensor([4.0, 9.0, 1.0, 1.0]))
    assert torch.equal(smoothing_scale(x, w, 0.0), torch.tensor([1.0, 0.25, 1.0, 1.0]))


def test_ranges_meet_in_the_middle():
    """With alpha 0.5 every channel's input and weight column end with the same largest value."""
    tokens, seen = random_tokens(0, 4, 32), {}
    model = smooth(spiky(), tokens, folds="norms+down", batch_size=3)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    # Not gate/up: the rows of up_proj took the scales of down_proj afterwards.
    groups = ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.down_proj,))
    for first, *_ in groups:
        first.register_forward_pre_hook(lambda m, args: seen.setdefault(m, args[0]))
    with torch.no_grad():
        model(tokens)
    for linears in groups:
        inputs = seen[linears[0]].abs().amax((0, 1))
        columns = torch.cat([linear.weight for linear in linears]).abs().amax(0)
        assert torch.allclose(inputs, columns, rtol=1e-3)


def test_better_than_rounding_with_outlier_channels():
    tokens = random_tokens(0, 8, 32)
    with torch.no_grad():
        target = spiky()(tokens).logits
        nearest = convert(spiky(), CONFIG)(tokens).logits
        ours = smoothquant(spiky(), CONFIG, tokens)(tokens).logits
    assert (ours - target).square().mean() < 0.7 * (nearest - target).square().mean()


def test_packed_equals_prepared_smoothed_model(tmp_path):
    """Table 8: the smoothed float model can be trained; untrained it is the packed one."""
    tokens, config = random_tokens(0, 4, 32), QATConfig.parse("4-8-4", kv_mode="serving")
    smoothed = smooth(spiky(), tokens)
    llmqat.save_pretrained(smoothed, tmp_path / "float")
    prepared = prepare(llmqat.from_pretrained(tmp_path / "float"), config)
    packed = smoothquant(spiky(), config, tokens)
    llmqat.save_pretrained(packed, tmp_path / "packed")
    with torch.no_grad():
        expected = prepared(tokens).logits
        assert torch.equal(packed(tokens).logits, expected)
        assert torch.equal(llmqat.from_pretrained(tmp_path / "packed")(tokens).logits, expected)


def test_refuses():
    tokens = random_tokens(0, 2, 8)
    model = spiky()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for options, message in (
        ({"alpha": -0.1}, "alpha: -0.1"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"alpha": "x"}, "alpha: 'x'"),
        ({"folds": "some"}, "folds: 'some' is not supported; use none, norms, norms"),
        ({"batch_size": 0}, "batch_size: 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            smooth(model, tokens, **options)
    with pytest.raises(ConfigError, match="w_bits"):
        smoothquant(model, QATConfig.parse("16-8-8"), tokens)
    with pytest.raises(DataError, match="vocabulary"):
        smoothquant(model, CONFIG, tokens + 127)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ConfigError, match="already prepared"):
        smooth(prepare(spiky(), CONFIG), tokens)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj: its calibration"):
        smooth(model, tokens)
