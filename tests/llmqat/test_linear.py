"""QATLinear and QuantizedLinear: class swap, code cache, autocast, gradients, memory."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import llmqat_kernels as qk
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.nn.linear import LinearSpec, QATLinear, clear_weight_cache
from llmqat.nn.quantized_linear import QuantizedLinear


def qat(setting="4-8-16", k=24, n=10, bias=True, is_kv=False, seed=0, **fields):
    torch.manual_seed(seed)
    spec = LinearSpec.from_config(QATConfig.parse(setting, **fields), is_kv=is_kv)
    return QATLinear.adopt(nn.Linear(k, n, bias=bias), spec)


def test_adopt_keeps_object_parameters_and_names():
    linear = nn.Linear(8, 4)
    weight, bias = linear.weight, linear.bias
    adopted = QATLinear.adopt(linear, LinearSpec.from_config(QATConfig.parse("4-8-16")))
    assert adopted is linear and isinstance(linear, nn.Linear)
    assert adopted.weight is weight and adopted.bias is bias
    assert list(adopted.state_dict()) == ["weight", "bias"]
    assert "W4A8" in repr(adopted)


def test_adopt_refuses_other_classes_and_group_sizes():
    spec = LinearSpec.from_config(QATConfig.parse("4-8-16"))
    with pytest.raises(ConfigError, match="QATLinear"):
        QATLinear.adopt(qat(), spec)
    with pytest.raises(ConfigError, match="group_size"):
        qat(group_size=7)


@pytest.mark.parametrize(
    "setting", ["4-8-16", "8-8-16", "4-6-16", "4-4-16", "2-8-16", "4-16-16", "16-8-16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_spec(setting, dtype):
    linear = qat(setting).to(dtype)
    spec = linear.spec
    x = torch.randn(2, 5, 24, dtype=dtype)
    w, a = spec.weight, spec.activation
    if w.enabled and a.enabled:
        expected = qk.qat_linear(x, linear.weight, linear.bias, w_bits=w.bits, a_bits=a.bits)
    elif w.enabled:
        weight = qk.fake_quantize(linear.weight, w.bits, scale_dtype=torch.bfloat16)
        expected = nn.functional.linear(x, weight, linear.bias)
    else:
        expected = nn.functional.linear(qk.fake_quantize(x, a.bits), linear.weight, linear.bias)
    assert torch.equal(linear(x), expected)


def test_paper_kv_is_an_output_quantizer_over_the_whole_row():
    linear, plain = qat("4-8-4", is_kv=True), qat("4-8-4")
    x = torch.randn(3, 24)
    assert torch.equal(linear(x), qk.fake_quantize(plain(x), 4))
    assert qat("4-8-4", is_kv=True, kv_mode="serving").spec.output.enabled is False
    alone = qat("16-16-4", is_kv=True)
    assert torch.equal(
        alone(x), qk.fake_quantize(nn.functional.linear(x, alone.weight, alone.bias), 4)
    )


def count_quantize(monkeypatch):
    calls = []
    real = qk.quantize
    monkeypatch.setattr(qk, "quantize", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


def test_codes_are_computed_once_per_weight(monkeypatch):
    linear = qat()
    calls = count_quantize(monkeypatch)
    x = torch.randn(3, 24)
    for _ in range(3):
        linear(x).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.5).step(),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.5, foreach=True).step(),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.5, fused=True).step(),
        lambda m: m.weight.detach().mul_(3.0),
        lambda m: m.load_state_dict({k: v * -2 for k, v in m.state_dict().items()}),
        lambda m: m.double().float().bfloat16().float(),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
        lambda m: (m.weight.data.mul_(2.0), clear_weight_cache(m)),
    ],
    ids=["sgd", "adamw-foreach", "adamw-fused", "in-place", "load", "cast", "new", "data"],
)
def test_stale_codes_are_found(change):
    linear = qat()
    linear(torch.randn(3, 24)).sum().backward()
    linear.weight_codes()
    with torch.no_grad():
        change(linear)
    fresh = qk.quantize(linear.weight.detach(), 4, scale_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(linear.weight_codes(), fresh, strict=True))


def test_optimizer_that_hides_its_writes():
    class Hidden(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(-1.0)

    linear = qat()
    before = linear.weight_codes()[0].clone()
    Hidden(linear.parameters()).step()
    assert torch.equal(linear.weight_codes()[0], -before)


def test_copies_and_pickles_do_not_carry_the_cache():
    linear = qat()
    linear.weight_codes()
    clone = copy.deepcopy(linear)
    with torch.no_grad():
        clone.weight.neg_()
    assert torch.equal(clone.weight_codes()[0], -linear.weight_codes()[0])
    assert torch.equal(
        pickle.loads(pickle.dumps(linear)).weight_codes()[0], linear.weight_codes()[0]
    )


def test_inference_mode_then_training():
    linear = qat()
    with torch.inference_mode():
        linear(torch.randn(2, 24))
    linear(torch.randn(2, 24)).sum().backward()
    assert linear.weight.grad is not None


def test_autocast():
    linear = qat()
    x = torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    expected = qk.qat_linear(x.bfloat16(), linear.weight, linear.bias, w_bits=4, a_bits=8)
    assert torch.equal(y, expected)  # codes from the fp32 weight, not from a bf16 copy
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(QuantizedLinear.from_qat(linear)(x), y)
        for setting in ("4-16-16", "16-8-16"):
            assert qat(setting)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["4-8-16", "4-16-16", "16-8-16", "16-16-4"])
def test_gradients_reach_everything(setting):
    linear = qat(setting, is_kv=True)
    x = torch.randn(3, 24, requires_grad=True)
    linear(x).square().sum().backward()
    for grad in (x.grad, linear.weight.grad, linear.bias.grad):
        assert grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.any())


def test_gradient_is_straight_through():
    linear = qat("4-8-16", bias=False)
    x = torch.randn(6, 24, requires_grad=True)
    g = torch.randn(6, 10)
    linear(x).backward(g)
    weight = qk.dequantize(*linear.weight_codes())
    inputs = qk.dequantize(*qk.quantize(x.detach(), 8))
    torch.testing.assert_close(x.grad, g @ weight)
    torch.testing.assert_close(linear.weight.grad, g.T @ inputs)


def test_checkpointed_recompute_gives_the_same():
    from torch.utils.checkpoint import checkpoint

    linear = qat()
    x = torch.randn(3, 24, requires_grad=True)
    linear(x).square().sum().backward()
    expected = linear.weight.grad.clone()
    linear.weight.grad = None
    checkpoint(linear, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(linear.weight.grad, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("k", [24, 25])
def test_quantized_linear_buffers(bits, k):
    linear = qat(f"{bits}-8-16", k=k)
    packed = QuantizedLinear.from_qat(linear)
    assert packed.weight_codes.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert packed.weight_codes.nbytes == 10 * ((k + 1) // 2 if bits == 4 else k)
    assert torch.equal(packed.int8_codes(), linear.weight_codes()[0])
    expected = qk.fake_quantize(linear.weight, bits, scale_dtype=torch.bfloat16)
    assert torch.equal(packed.dequantize(), expected)
    assert f"W{bits}A8" in repr(packed)
    assert set(packed.state_dict()) == {"weight_codes", "weight_scale", "bias"}


def test_scales_stay_fp32_through_casts():
    packed = QuantizedLinear.from_qat(qat("4-8-16", weight_scale_dtype="float32"))
    scale = packed.weight_scale.clone()
    packed.bfloat16().half()
    assert packed.weight_scale.dtype == torch.float32 and torch.equal(packed.weight_scale, scale)
    assert packed.bias.dtype == torch.float16


def test_packed_memory_is_half_a_byte():
    linear = qat("4-8-16", k=512, n=512, bias=False)
    packed = QuantizedLinear.from_qat(linear)
    del linear
    gc.collect()
    held = sum(t.untyped_storage().nbytes() for t in packed.state_dict().values())
    assert held == 512 * 256 + 512 * 4
    assert held <= 0.26 * 512 * 512 * 2


def test_non_finite_weight_is_refused():
    linear = qat()
    with torch.no_grad():
        linear.weight[3, 3] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        QuantizedLinear.from_qat(linear)
