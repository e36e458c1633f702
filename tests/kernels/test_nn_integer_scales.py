"""llmqat_kernels.nn with integer scales of groups (spec 18)."""

import dataclasses

import pytest
import torch
from torch import nn

import llmqat_kernels as qk
from llmqat_kernels import nn as qnn
from llmqat_kernels.errors import InvalidArgument
from llmqat_kernels.spec import linear as linear_spec
from llmqat_kernels.spec import quantize
from tests.kernels.test_nn import INTEGER, grads, linear


@pytest.mark.parametrize("form", ["float", "rows", "gated"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integer_scales(backend, dtype, clip, form):
    """Forward is spec 18 on codes, backward that of the values that codes and scales stand for."""
    bits = dataclasses.replace(INTEGER, ste_clip=clip)
    layer = linear(bits=bits, dtype=dtype)
    x, up = (torch.randn(2, 5, 24, dtype=dtype, requires_grad=True) for _ in range(2))
    given = {
        "float": lambda: x,
        "rows": lambda: qnn.QuantizedRows.quantize(x, 8),
        "gated": lambda: qnn.GatedRows(x, up),
    }[form]()
    got = layer(given)

    values = qk.silu_mul(x, up) if form == "gated" else x
    a, a_scale = quantize.quantize(values.detach(), 8)
    codes, multiplier, scale = quantize.quantize_integer_groups(layer.weight.detach(), 4, 8)
    product = codes, multiplier, scale, layer.bias.detach(), 8, dtype
    assert torch.equal(got, linear_spec.integer_group_matmul(a, a_scale, *product))

    if form == "gated":
        return  # see the next test
    dx, dw, db = grads(got, [x, layer.weight, layer.bias])
    g = torch.sin(torch.arange(got.numel())).view_as(got).to(dtype)
    weight = qk.dequantize(codes, multiplier * scale[:, None], group_size=8, dtype=dtype)
    seen = qk.dequantize(a, a_scale, dtype=dtype)
    keep = [torch.ones_like(t) if clip is None else (t.abs() < clip) for t in (x, layer.weight)]
    bound = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(dx, (g @ weight) * keep[0], rtol=bound, atol=bound)
    flat = g.flatten(0, 1).T @ seen.flatten(0, 1)
    torch.testing.assert_close(dw, flat * keep[1], rtol=bound, atol=bound)
    torch.testing.assert_close(db, g.sum((0, 1)), rtol=bound, atol=bound)


def test_integer_scales_train_through_the_gate(backend):
    """All gradients are those of the same linear on rows of ``silu(gate) * up``."""
    layer = linear(bits=INTEGER)
    gate, up = (torch.randn(2, 5, 24, requires_grad=True) for _ in range(2))
    inputs = [gate, up, layer.weight, layer.bias]
    gated = qnn.GatedRows(gate, up)
    got, expected = layer(gated), layer(gated.quantize(8))
    assert torch.equal(got, expected)
    for a, b in zip(grads(got, inputs), grads(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_codes_of_integer_scales_are_kept(monkeypatch):
    layer, calls, real = linear(bits=INTEGER), [], qk.quantize_integer_groups
    monkeypatch.setattr(
        qk, "quantize_integer_groups", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    for _ in range(3):
        layer(torch.randn(2, 24)).sum().backward()
    assert len(calls) == 1
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    codes, scales = layer.weight_codes()
    assert len(calls) == 2 and scales.shape == (10, 3)
    assert torch.equal(codes, real(layer.weight.detach(), 4, group_size=8)[0])


@pytest.mark.parametrize(
    ("fields", "k", "says"),
    [
        ({"w_bits": 5, "group_size": 8}, 24, "w_bits: integer groups hold 2..4 bits"),
        ({}, 24, "group_size: -1 has no groups"),
        ({"group_size": 2}, 38_344, "x: 38344 features exceed 38342"),
        ({"scale_dtype": torch.int8}, 24, "scale_dtype: torch.int8 is not supported"),
    ],
)
def test_where_integer_scales_do_not_go(fields, k, says):
    bits = qnn.LinearBits(**{"w_bits": 4, "a_bits": 8, "scale_dtype": torch.uint8} | fields)
    for make in (lambda: linear(k, 2, bits), lambda: qnn.QATLinear.adopt(nn.Linear(k, 2), bits)):
        with pytest.raises(InvalidArgument, match=says):
            make()
