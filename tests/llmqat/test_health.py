"""Health metrics on cases small enough to count by hand."""

import pytest
import torch
from torch import nn

from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.nn import LinearSpec, QATLinear
from llmqat.train.health import Count, HealthMonitor, clipped, flipped, saturated
from tests.llmqat.tiny import random_tokens, tiny_llama


def _layer(weight, *, w_bits=4, a_bits=8, ste_clip=None):
    """A model with one prepared layer `block.up_proj` of the given weight rows."""
    weight = torch.tensor(weight)
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"up_proj": nn.Linear(weight.shape[1], len(weight))})}
    )
    linear = model["block"]["up_proj"]
    linear.weight.data.copy_(weight)
    config = QATConfig(w_bits, a_bits, 16, ste_clip=ste_clip, weight_scale_dtype="float32")
    return model, QATLinear.adopt(linear, LinearSpec.from_config(config))


def test_counts():
    codes = torch.tensor([[7, -7, 0, 3], [1, 2, -7, -6]], dtype=torch.int8)
    other = torch.tensor([[7, -7, 1, 3], [1, 2, 7, -6]], dtype=torch.int8)
    assert flipped(codes, other) == Count(2, 8)
    assert saturated(codes, 4) == Count(3, 8)
    assert saturated(codes, 8) == Count(0, 8)
    assert clipped(torch.tensor([1.99, -2.0, 2.5, 0.0, float("nan")]), 2.0) == Count(2, 5)
    total = Count(1, 2)
    total += Count(2, 6)
    assert (total.share, Count().share) == (3 / 8, 0.0)


def test_flips_since_the_previous_report():
    model, layer = _layer([[7.0, 1.0, 2.0, 3.0], [-7.0, 4.0, 5.0, 6.0]])
    monitor = HealthMonitor(model)
    monitor.reset()
    assert monitor.report()["health/flipped"] == 0
    with torch.no_grad():
        layer.weight[0, 1] = 1.4  # rounds to the same code
        layer.weight[0, 2] = 2.6  # becomes 3
        layer.weight[1, 3] = -6.0
    report = monitor.report()
    assert report["health/flipped"] == report["health/flipped/up_proj"] == 2 / 8
    assert monitor.report()["health/flipped"] == 0


def test_no_flips_without_a_reference():
    model, _ = _layer([[1.0, 2.0]])
    assert "health/flipped" not in HealthMonitor(model).report()


def test_saturation_of_weights_and_activations():
    model, layer = _layer([[7.0, -7.0, 0.0, 1.0], [1.0, 2.0, 3.0, 7.0]])
    monitor = HealthMonitor(model)
    with monitor.watch():
        layer(torch.tensor([[1.0, -1.0, 0.0, 0.5], [4.0, 4.0, 4.0, -4.0]]))
    layer(torch.ones(1, 4))  # not watched
    report = monitor.report()
    assert report["health/weight_saturated"] == 3 / 8
    assert report["health/activation_saturated"] == 6 / 8
    assert "health/activation_clipped" not in report
    assert "health/activation_saturated" not in monitor.report()


def test_zeroed_gradients_are_those_that_are_reported():
    model, layer = _layer([[2.0, -3.0, 0.5, 1.0]], ste_clip=2.0)
    x = torch.tensor([[1.0, 2.0, -5.0, 0.0], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    monitor = HealthMonitor(model)
    with monitor.watch():
        layer(x).sum().backward()
    report = monitor.report()
    assert report["health/weight_clipped"] == 2 / 4
    assert report["health/activation_clipped"] == 2 / 8
    assert (layer.weight.grad == 0).tolist() == [[True, True, False, False]]
    assert (x.grad == 0).tolist() == [[False, True, True, False], [False] * 4]


def test_watch_can_be_off_and_leaves_no_hook():
    model, layer = _layer([[1.0, 2.0]])
    monitor = HealthMonitor(model)
    with monitor.watch(active=False):
        layer(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="stop"), monitor.watch():
        raise RuntimeError("stop")
    layer(torch.ones(1, 2))
    assert not layer._forward_pre_hooks
    assert "health/activation_saturated" not in monitor.report()


def test_weights_that_are_not_quantized_have_no_codes():
    model, layer = _layer([[1.0, 2.0]], w_bits=16)
    monitor = HealthMonitor(model)
    monitor.reset()
    with monitor.watch():
        layer(torch.ones(1, 2))
    assert set(monitor.report()) == {
        "health/activation_saturated",
        "health/activation_saturated/up_proj",
    }


def test_groups_of_a_model():
    model = prepare(tiny_llama(), QATConfig.parse("4-8-4", ste_clip=2.0))
    monitor = HealthMonitor(model)
    monitor.reset()
    with torch.no_grad(), monitor.watch():
        expected = model(random_tokens(0, 1, 8)).logits
    report = monitor.report()
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split("/")[2] for name in report if name.count("/") == 2} == linears
    assert all(0 <= share <= 1 for share in report.values())
    # Every row holds at least one code at the end of its range.
    assert report["health/weight_saturated/q_proj"] >= 1 / 64
    with torch.no_grad():
        assert torch.equal(model(random_tokens(0, 1, 8)).logits, expected)
