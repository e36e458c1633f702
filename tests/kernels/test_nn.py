"""llmqat_kernels.nn: modules of a training loop that knows no model family."""

import copy
import pickle

import pytest
import torch
from torch import nn

import llmqat_kernels as qk
from llmqat_kernels import nn as qnn
from llmqat_kernels.errors import InvalidArgument, InvalidArgumentType
from llmqat_kernels.spec import norm as spec
from llmqat_kernels.testing import assert_within_ratio

W4A8 = qnn.LinearBits(4, 8)
CLIPPED = qnn.LinearBits(4, 8, ste_clip=1.0)
GROUPS = qnn.LinearBits(4, 8, group_size=8)
INTEGER = qnn.LinearBits(4, 8, group_size=8, scale_dtype=torch.uint8)


def linear(k=24, n=10, bits=W4A8, **options):
    return qnn.QATLinear(k, n, bits=bits, **options)


def grads(output, inputs):
    return torch.autograd.grad(
        output, inputs, torch.sin(torch.arange(output.numel())).view_as(output)
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Rows


@pytest.mark.parametrize("bits", [W4A8, CLIPPED, GROUPS, INTEGER], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_the_float_input(backend, bits, dtype):
    """A linear on rows equals the linear on what they stand for, forward and backward."""
    layer = linear(bits=bits, dtype=dtype)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    rows = qnn.QuantizedRows.quantize(x, 8)
    inputs = [x, layer.weight, layer.bias]
    expected, got = layer(x), layer(rows)
    assert torch.equal(got, expected)
    assert same(grads(got, inputs), grads(expected, inputs))


def test_rows_keep_codes_only():
    x = torch.randn(64, 24, requires_grad=True)
    layer, kept = linear(), []
    layer.weight_codes()
    rows = qnn.QuantizedRows.quantize(x, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(rows)
    shapes = [(t.dtype, t.shape) for t in kept if t.numel() >= 64]
    assert (torch.int8, x.shape) in shapes
    assert not any(dtype.is_floating_point and shape == x.shape for dtype, shape in shapes)


def test_rows_of_other_bits_are_refused():
    layer = linear(bits=qnn.LinearBits(4, 4))
    x = torch.randn(2, 24)
    for rows in (qnn.QuantizedRows.quantize(x, 8), qnn.QuantizedRMSNorm(24, W4A8)(x)[0]):
        with pytest.raises(InvalidArgument, match=r"x: rows of 8 bits, .* a_bits 4"):
            layer(rows)
    assert layer(qnn.QuantizedRows.quantize(x, 4)).shape == (2, 10)
    assert qnn.GatedRows(x, x).quantize(4).bits == 4


# Norms


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("bits", [W4A8, CLIPPED], ids=["handle", "values"])
def test_norm_and_linears_are_their_operators(backend, with_residual, bits):
    """The producer shares codes among consumers: the bits of the norm, then the linears."""
    norm = qnn.QuantizedRMSNorm(24, bits, eps=1e-5)
    layers = [linear(bits=bits) for _ in range(3)]
    with torch.no_grad():
        norm.weight.normal_()
    x, residual = (torch.randn(2, 3, 24, requires_grad=True) for _ in range(2))
    added = residual if with_residual else None
    inputs = [x, norm.weight, *(layer.weight for layer in layers)] + [residual] * with_residual

    rows, total = norm(x, added)
    got = total + sum(layer(rows).mean() for layer in layers)
    stream = x + residual if with_residual else x
    y = qk.rms_norm(stream, norm.weight, 1e-5)
    expected = stream + sum(layer(y).mean() for layer in layers)
    assert torch.equal(got, expected)
    for a, b in zip(grads(got, inputs), grads(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_the_spec_and_its_gradient_the_real_one(backend, dtype):
    norm = qnn.RMSNorm(40, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 40, dtype=dtype, requires_grad=True)
    y = norm(x)
    assert torch.equal(y, spec.rms_norm(x, norm.weight, 1e-5))

    def real(x, weight):
        out = nn.functional.rms_norm(x, (40,), weight.to(x.dtype), 1e-5)
        return grads(out, [x, weight])

    wide = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    for a, plain, exact in zip(
        grads(y, [x, norm.weight]), real(x, norm.weight), real(*wide), strict=True
    ):
        assert_within_ratio(a, plain, exact, ratio=3.0)


def test_norm_has_an_operator_with_autograd():
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    torch.library.opcheck(torch.ops.llmqat.rms_norm.default, (x, weight, 1e-5))


# SwiGLU


@pytest.mark.parametrize("bits", [W4A8, CLIPPED], ids=["handle", "values"])
@pytest.mark.parametrize("form", ["float", "rows"])
def test_swiglu_is_its_operators(backend, bits, form):
    gate, up = (linear(24, 40, bits, bias=False) for _ in range(2))
    down = linear(40, 24, bits)
    mlp = qnn.QuantizedSwiGLU(gate, up, down)
    x = torch.randn(2, 3, 24, requires_grad=True)
    got = mlp(x if form == "float" else qnn.QuantizedRows.quantize(x, 8))
    y, _, _ = qk.silu_mul_quantize_train(gate(x), up(x), 8)
    expected = down(y)
    assert torch.equal(got, expected)
    inputs = [x, *mlp.parameters()]
    assert len(inputs) == 5
    assert same(grads(got, inputs), grads(expected, inputs))


# The linear and its codes


def test_adopted_modules_are_the_same_objects():
    layer, norm = nn.Linear(8, 4), nn.LayerNorm(8, bias=False)
    weight = layer.weight
    assert qnn.QATLinear.adopt(layer, W4A8) is layer and layer.weight is weight
    assert qnn.QuantizedRMSNorm.adopt(norm, W4A8, 1e-5) is norm
    rows, _ = norm(torch.randn(3, 8))
    assert layer(rows).shape == (3, 4)
    assert "W4A8" in repr(layer) and "A8" in repr(norm)
    assert "eps=1e-05" in repr(qnn.RMSNorm.adopt(nn.LayerNorm(8, bias=False), 1e-5))


def test_errors_name_the_argument():
    with pytest.raises(InvalidArgumentType, match=r"linear: .*Conv1d"):
        qnn.QATLinear.adopt(nn.Conv1d(1, 1, 1), W4A8)
    for bits, name in (((1, 8), "w_bits"), ((4, 16), "a_bits"), ((4, 8, 5), "group_size")):
        with pytest.raises(InvalidArgument, match=name):
            linear(bits=qnn.LinearBits(*bits))
    mlp = nn.Module()
    mlp.gate_proj = linear()
    with pytest.raises(InvalidArgumentType, match=r"mlp: up_proj"):
        qnn.QuantizedSwiGLU.adopt(mlp)
    with pytest.raises(InvalidArgumentType, match=r"mlp: gate_proj"):
        qnn.QuantizedSwiGLU(*(nn.Linear(24, 24) for _ in range(3)))
    with pytest.raises(InvalidArgument, match=r"gate_proj has a_bits 8 and up_proj 4"):
        qnn.QuantizedSwiGLU(linear(), linear(bits=qnn.LinearBits(4, 4)), linear(10, 24))


def test_what_a_linear_and_a_norm_take():
    norm, layer = qnn.QuantizedRMSNorm(24, W4A8), linear()
    for wrong, name in ((norm(torch.randn(2, 24)), "tuple"), ([1.0], "list"), (None, "NoneType")):
        says = rf"^x: expected a Tensor or QuantizedRows, got {name}; .* returns \(rows, sum\)$"
        with pytest.raises(InvalidArgumentType, match=says):
            layer(wrong)
    for call in (
        lambda: qnn.QATLinear(64, 32, bits=4),
        lambda: qnn.QATLinear.adopt(nn.Linear(64, 32), 4),
        lambda: qnn.QuantizedRMSNorm(64, 4),
        lambda: qnn.QuantizedRMSNorm.adopt(nn.LayerNorm(64, bias=False), 4, 1e-5),
    ):
        with pytest.raises(InvalidArgumentType, match=r"^bits: expected LinearBits, got int$"):
            call()


def test_bits_are_checked_where_they_are_written():
    for options, error, name in (
        ((1, 8), InvalidArgument, "w_bits"),
        ((4, 9), InvalidArgument, "a_bits"),
        (("4", 8), InvalidArgumentType, "w_bits"),
        ((4, True), InvalidArgumentType, "a_bits"),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            qnn.LinearBits(*options)


@pytest.mark.parametrize(
    "gate, up, down, says",
    [
        ((24, 96), (24, 80), (96, 24), "gate_proj has out_features 96 and up_proj out_features 80"),
        ((24, 96), (16, 96), (96, 24), "gate_proj has in_features 24 and up_proj in_features 16"),
        ((24, 96), (24, 96), (80, 24), "gate_proj has out_features 96 and down_proj in_features"),
    ],
)
def test_swiglu_refuses_features_that_do_not_fit(gate, up, down, says):
    parts = [qnn.QATLinear(*sizes, bits=W4A8) for sizes in (gate, up, down)]
    with pytest.raises(InvalidArgument, match=f"^mlp: {says}"):
        qnn.QuantizedSwiGLU(*parts)
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = parts
    with pytest.raises(InvalidArgument, match=f"^mlp: {says}"):
        qnn.QuantizedSwiGLU.adopt(mlp)
    assert type(mlp) is nn.Module


@pytest.mark.parametrize(
    "norm, says",
    [
        (nn.LayerNorm(8), "besides weight .bias"),
        (nn.RMSNorm(8, elementwise_affine=False), "no parameter weight"),
        (nn.LayerNorm((4, 8), bias=False), "no parameter weight"),
        (nn.Sequential(nn.LayerNorm(8)), "no parameter weight"),
    ],
    ids=str,
)
def test_norms_that_cannot_be_adopted(norm, says):
    kind = type(norm)
    for adopt in (
        lambda: qnn.RMSNorm.adopt(norm, 1e-5),
        lambda: qnn.QuantizedRMSNorm.adopt(norm, W4A8, 1e-5),
    ):
        with pytest.raises(InvalidArgumentType, match=f"norm: .*{says}"):
            adopt()
    assert type(norm) is kind


def test_codes_are_kept_until_the_weight_changes(monkeypatch):
    layer, calls, real = linear(), [], qk.quantize
    monkeypatch.setattr(qk, "quantize", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    for _ in range(3):
        layer(torch.randn(2, 24)).sum().backward()
    assert len(calls) == 1
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    fresh = real(layer.weight.detach(), 4, scale_dtype=torch.bfloat16)
    assert same(layer.weight_codes(), fresh) and len(calls) == 2
    layer.weight.data.neg_()
    layer.clear_cache()
    assert torch.equal(layer.weight_codes()[0], -fresh[0])


def test_one_cache_knows_its_settings():
    codes, weight = qnn.WeightCodes(), torch.randn(4, 16)
    for bits, group, dtype in (
        (4, -1, torch.bfloat16),
        (8, -1, torch.bfloat16),
        (8, 4, torch.float32),
    ):
        got = codes.get(weight, bits, group, dtype)
        assert same(got[:2], qk.quantize(weight, bits, group_size=group, scale_dtype=dtype))
        assert got.multiplier is None and got.scales is got.scale
    got = codes.get(weight, 4, 4, torch.uint8)
    want = qk.quantize_integer_groups(weight, 4, group_size=4)
    assert same((got.codes, got.multiplier, got.scale), want)
    assert torch.equal(got.scales, want[1] * want[2][:, None])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_start_without_codes(copied):
    layer = linear()
    codes = layer.weight_codes()[0].clone()
    clone = copied(layer)
    clone.weight.data.neg_()
    assert torch.equal(clone.weight_codes()[0], -codes)


@pytest.mark.parametrize("module", ["norm", "rows", "linear"])
def test_autocast_casts_the_input(module):
    x = torch.randn(2, 24)
    norm = qnn.QuantizedRMSNorm(24, W4A8)
    with torch.autocast("cpu", torch.bfloat16):
        if module == "linear":
            assert linear()(x).dtype == torch.bfloat16
        else:
            rows = norm(x, x)[0] if module == "norm" else qnn.QuantizedRows.quantize(x, 8)
            assert rows.values.dtype == linear()(rows).dtype == torch.bfloat16
        assert norm(x)[1].dtype == qnn.RMSNorm(24)(x).dtype == torch.bfloat16


def test_compile_fullgraph():
    norm, layer = qnn.QuantizedRMSNorm(24, W4A8), linear(24, 24)
    mlp = qnn.QuantizedSwiGLU(linear(24, 40), linear(24, 40), linear(40, 24))
    parameters = [*norm.parameters(), *layer.parameters(), *mlp.parameters()]

    def block(x):
        rows, total = norm(x)
        rows, total = norm(layer(rows), total)
        return total + mlp(rows)

    x = torch.randn(2, 24)
    expected = block(x)
    torch._dynamo.reset()
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, expected)
    for a, b in zip(grads(got, parameters), grads(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
