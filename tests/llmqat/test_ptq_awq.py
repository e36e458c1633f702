"""AWQ: the search finds what brute force finds, folds keep the function, errors never grow."""

import copy

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat.config import QATConfig
from llmqat.convert import convert, state_of
from llmqat.errors import ConfigError
from llmqat.nn.linear import LinearSpec
from llmqat.ptq import BlockJournal, awq
from llmqat.ptq.awq import channel_scale, output_error, search_scale
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("4-16-16")


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


def spiky(**variant):
    """A model with a few much used channels."""
    model = tiny_llama(**variant)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] *= 15
            layer.post_attention_layernorm.weight[9] *= 15
    return model


def test_output_error_is_the_squared_difference():
    g = torch.Generator().manual_seed(0)
    w, v, x = (torch.randn(*s, generator=g) for s in ((6, 8), (6, 8), (50, 8)))
    direct = (x @ w.T - x @ v.T).double().square().sum()
    assert output_error(w, v, (x.T @ x).double()) == pytest.approx(float(direct), rel=1e-4)


def test_channel_scale():
    scale = channel_scale(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    assert torch.allclose(scale, torch.tensor([0.5, 1.0, 2.0]))
    assert torch.equal(channel_scale(torch.tensor([1.0, 4.0, 0.0]), 0.0), torch.ones(3))
    assert torch.isfinite(channel_scale(torch.zeros(3), 0.5)).all()


@pytest.mark.parametrize("fields", [{}, {"group_size": 16}])
def test_search_is_the_best_of_its_grid(fields):
    spec = LinearSpec.from_config(QATConfig.parse("4-16-16", **fields))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 32, generator=g) * torch.rand(32, generator=g).mul(4).exp()
    weights = [torch.randn(n, 32, generator=g) for n in (24, 8)]
    gram, importance = (x.T @ x).double(), x.abs().mean(0)
    scale, after, before = search_scale(weights, gram, importance, spec, grid=10)
    direct = []
    for step in range(10):
        s = channel_scale(importance, step / 10)
        direct.append(0.0)
        for w in weights:
            y = x @ (qk.fake_quantize(w * s, 4, scale_dtype=torch.bfloat16, **fields) / s - w).T
            direct[-1] += float(y.double().square().sum())
    best = min(range(10), key=direct.__getitem__)
    assert best > 0
    assert torch.equal(scale, channel_scale(importance, best / 10))
    assert (after, before) == (
        pytest.approx(direct[best], rel=1e-3),
        pytest.approx(direct[0], rel=1e-3),
    )


@pytest.mark.parametrize(
    ("setting", "fields"),
    [("4-16-16", {}), ("4-16-16", {"group_size": 16}), ("4-8-4", {"kv_mode": "serving"})],
)
@pytest.mark.parametrize("variant", [{}, {"kv_heads": 4, "bias": True}])
def test_whole_model(tmp_path, setting, fields, variant):
    tokens, config = random_tokens(0, 8, 32), QATConfig.parse(setting, **fields)
    model = awq(spiky(**variant), config, tokens)
    assert (state_of(model).stage, state_of(model).config) == ("packed", config)
    with torch.no_grad():
        target = spiky(**variant)(tokens).logits
        nearest = convert(spiky(**variant), config)(tokens).logits
        ours = model(tokens).logits
    if setting == "4-16-16":
        assert (ours - target).square().mean() < (nearest - target).square().mean()
    llmqat.save_pretrained(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(llmqat.from_pretrained(tmp_path / "m")(tokens).logits, ours)


def test_a_grid_of_one_is_round_to_nearest():
    model = awq(tiny_llama(), CONFIG, random_tokens(0, 4, 16), grid=1)
    for name, buffer in convert(tiny_llama(), CONFIG).named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))


def test_a_quantized_cache_keeps_its_values():
    """Rows of v_proj are not scaled where K and V are quantized, unless one asks for it."""
    tokens, config = random_tokens(0, 8, 32), QATConfig.parse("4-8-4")
    plain = spiky()
    columns = {}
    for folds in (None, "norms+down", "all"):
        model = awq(copy.deepcopy(plain), config, tokens, folds=folds)
        columns[folds] = model.model.layers[0].self_attn.o_proj.int8_codes()
    nearest = convert(copy.deepcopy(plain), config).model.layers[0].self_attn.o_proj.int8_codes()
    assert torch.equal(columns[None], nearest) and torch.equal(columns["norms+down"], nearest)
    assert not torch.equal(columns["all"], nearest)


def test_a_killed_run_goes_on_with_the_same_codes(tmp_path):
    tokens = random_tokens(0, 8, 16)
    expected = awq(spiky(layers=3), CONFIG, tokens)
    with BlockJournal(tmp_path / "j", {}, resume=False) as journal:
        awq(spiky(layers=3), CONFIG, tokens, journal=journal)
    (tmp_path / "j" / "block-00002.safetensors").unlink()
    with BlockJournal(tmp_path / "j", {}, resume=True) as journal:
        resumed = awq(spiky(layers=3), CONFIG, tokens, journal=journal)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_refuses():
    tokens = random_tokens(0, 2, 8)
    for options, message in (({"grid": 0}, "grid: 0"), ({"folds": "o"}, "folds: 'o'")):
        with pytest.raises(ConfigError, match=message):
            awq(tiny_llama(), CONFIG, tokens, **options)
    with pytest.raises(ConfigError, match="w_bits"):
        awq(tiny_llama(), QATConfig.parse("16-8-8"), tokens)
