"""llmqat_kernels.nn.QuantizedKV: rotation and the quantizer of keys and values, for training."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels import nn as qnn
from llmqat_kernels.errors import InvalidArgument, InvalidArgumentType
from tests.kernels.test_nn import same


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("tables", ["shared", "per sequence", "full width"])
def test_kv_is_rope_and_row_quantizer(backend, mode, bits, tables):
    batch, length, heads, kv_heads, dim = 2, 5, 4, 2, 8
    q = torch.randn(batch, length, heads * dim)
    k, v = torch.randn(2, batch, length, kv_heads * dim)
    positions = torch.stack([torch.arange(length), torch.arange(length) + 3])
    if tables != "per sequence":
        positions = positions[:1]
    angles = positions[..., None] * torch.logspace(0, -2, dim // 2)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        c, s = cos[:, :, None], sin[:, :, None]
        first, second = x.chunk(2, -1)
        return torch.cat((first * c + (-second) * s, second * c + first * s), -1)

    def quantize(x):
        rows = x.flatten(2) if mode == "paper" else x
        return (qk.fake_quantize(rows, bits) if bits < 16 else rows).view(x.shape)

    split = [x.view(batch, length, -1, dim) for x in (q, k, v)]
    key = rotate(quantize(split[1])) if mode == "paper" else quantize(rotate(split[1]))
    expected = rotate(split[0]), key, quantize(split[2])
    if tables == "full width":
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
    got = qnn.QuantizedKV(dim, bits, mode)(q, k, v, cos, sin)
    assert [tuple(t.shape) for t in got] == [
        (batch, n, length, dim) for n in (heads, kv_heads, kv_heads)
    ]
    assert same(got, (t.transpose(1, 2) for t in expected))


def test_kv_gradient_is_straight_through_and_turned_back():
    q, k, v = (torch.randn(1, 3, 8, requires_grad=True) for _ in range(3))
    angle = torch.randn(1, 3, 4)
    kv = qnn.QuantizedKV(8, 4)
    out = kv(q, k, v, angle.cos(), angle.sin())
    upstream = [torch.randn_like(t) for t in out]
    got = torch.autograd.grad(out, [q, k, v], upstream)
    flat = [t.transpose(1, 2).flatten(2) for t in upstream]
    plain = qnn.QuantizedKV(8, 16)(*flat, angle.cos(), -angle.sin())
    for a, b in zip(got[:2], plain[:2], strict=True):
        torch.testing.assert_close(a, b.transpose(1, 2).flatten(2))
    assert torch.equal(got[2], flat[2])


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.expand(2, -1, -1), lambda t: t[0]])
def test_kv_takes_every_form_of_one_table(form):
    q, k, v = torch.randn(3, 2, 5, 8)
    angles = torch.arange(5)[None, :, None] * torch.logspace(0, -2, 4)
    kv = qnn.QuantizedKV(8, 8)
    expected = kv(q, k, v, angles.cos(), angles.sin())
    assert same(kv(q, k, v, form(angles.cos()), form(angles.sin())), expected)


def test_kv_compiles_for_every_length():
    kv = qnn.QuantizedKV(8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(kv, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 4), (3, 5), (2, 7)):
        q, k, v = torch.randn(3, batch, length, 16)
        tables = torch.randn(2, 1, length, 4)
        assert same(compiled(q, k, v, *tables), kv(q, k, v, *tables))


@pytest.mark.parametrize(
    "shape", [(1, 8, 4), (1, 2, 4), (8, 4), (4, 1, 4), (1, 1, 4, 4), (1, 4, 2), (4,)], ids=str
)
def test_kv_refuses_tables_of_other_positions(shape):
    """[1, 8, D / 2] holds as many rows as 2 sequences of 4 tokens, at other positions."""
    q, k, v = torch.randn(3, 2, 4, 16)
    fitting, table = torch.randn(1, 4, 4), torch.randn(shape)
    for tables in ((table, table), (fitting, table), (table, fitting)):
        with pytest.raises(InvalidArgument, match=r"cos, sin: expected \[1 or 2, 4, 4\]"):
            qnn.QuantizedKV(8, 8)(q, k, v, *tables)


def test_kv_errors_name_the_argument():
    for options, name in (
        ({"head_dim": 7, "bits": 8}, "head_dim"),
        ({"head_dim": 0, "bits": 8}, "head_dim"),
        ({"head_dim": 8, "bits": 9}, "bits"),
        ({"head_dim": 8, "bits": 8, "mode": "x"}, "mode"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}: "):
            qnn.QuantizedKV(**options)
    with pytest.raises(InvalidArgumentType, match="head_dim"):
        qnn.QuantizedKV(8.0, 8)
    q, table = torch.randn(2, 4, 16), torch.randn(1, 4, 4)
    for k in (torch.randn(4, 2, 16), torch.randn(2, 4, 12), torch.randn(8, 16)):
        with pytest.raises(InvalidArgument, match=r"k: expected \[2, 4, heads \* 8\]"):
            qnn.QuantizedKV(8, 8)(q, k, q, table, table)
