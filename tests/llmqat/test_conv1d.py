"""GPT-2's Conv1D: the numbers of a linear with the transposed weight, in its own parameter."""

import pytest
import torch
from tiny_families import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError
from llmqat.nn.conv1d import QATConv1D, adopt_linear, row_weight
from llmqat.nn.linear import LinearSpec, QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear

SETTINGS = [
    QATConfig.parse("4-8-16"),
    QATConfig.parse("8-8-16", group_size=16),
    QATConfig.parse("4-16-16"),
    QATConfig.parse("16-8-16"),
    QATConfig.parse("4-4-16", w_quantizer="asymmetric", a_quantizer="asymmetric"),
]


def pair(spec, k=48, n=40):
    """A Conv1D and a linear with the same weights, both prepared."""
    torch.manual_seed(0)
    conv, linear = Conv1D(n, k), nn.Linear(k, n)
    with torch.no_grad():
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    assert torch.equal(row_weight(conv), row_weight(linear))
    return adopt_linear(conv, spec), adopt_linear(linear, spec)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_equals_a_linear(config, backend):
    spec = LinearSpec.from_config(config)
    conv, linear = pair(spec)
    assert type(conv) is QATConv1D and type(linear) is QATLinear
    x = torch.randn(3, 5, 48)
    y, expected = conv(x), linear(x)
    # Float products of another memory order may round differently.
    compare = torch.testing.assert_close if not spec.is_integer else exactly_equal
    compare(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    gradient = dict(conv.named_parameters())["weight"].grad
    torch.testing.assert_close(gradient.t(), linear.weight.grad)
    torch.testing.assert_close(conv.bias.grad, linear.bias.grad)
    if config.weight.has_codes:
        packed, theirs = QuantizedLinear.from_qat(conv), QuantizedLinear.from_qat(linear)
        assert torch.equal(packed.weight_codes, theirs.weight_codes)
        assert torch.equal(packed.weight_scale, theirs.weight_scale)
        exactly_equal(packed(x), theirs(x))


def exactly_equal(a, b):
    assert torch.equal(a, b)


def test_conv1d_keeps_its_parameter():
    model = tiny_model("gpt2")
    linear = model.transformer.h[0].attn.c_attn
    parameter = linear.weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = linear(x)
    prepare(model, QATConfig.parse("8-8-16"))
    assert isinstance(linear, QATLinear) and isinstance(linear, nn.Linear)
    assert dict(linear.named_parameters())["weight"] is parameter
    assert linear.weight.shape == (192, 64) and parameter.shape == (64, 192)
    assert (linear.in_features, linear.out_features) == (64, 192)
    assert "in_features=64, out_features=192" in repr(linear)
    torch.testing.assert_close(linear(x), expected, rtol=0.05, atol=0.05)
    # One scale per output channel: a huge weight changes the codes of its own row only.
    codes, scale = (t.clone() for t in linear.weight_codes())
    assert linear.weight_codes()[0] is linear.weight_codes()[0]
    with torch.no_grad():
        parameter[3, 7] = 50.0
    after, after_scale = linear.weight_codes()
    assert (after_scale != scale).nonzero().flatten().tolist() == [7]
    assert (after != codes).any(1).nonzero().flatten().tolist() == [7]


def test_what_cannot_be_adopted():
    spec = LinearSpec.from_config(QATConfig.parse("4-8-16", group_size=7))
    with pytest.raises(ConfigError, match="group_size: 7 does not divide the 48"):
        adopt_linear(Conv1D(40, 48), spec)
    with pytest.raises(ConfigError, match=r"expected a plain nn\.Linear, found QATConv1D"):
        adopt_linear(pair(LinearSpec.from_config(QATConfig.parse("4-8-16")))[0], spec)
    with pytest.raises(ConfigError, match=r"expected a plain nn\.Conv1D, found Linear"):
        QATConv1D.adopt(nn.Linear(4, 4), spec)
