"""rope_fake_quantize, the training form of the KV cache: spec 19 on every backend."""

import pytest
import torch

from llmqat_kernels import InvalidArgument
from llmqat_kernels.kv import rope_fake_quantize
from llmqat_kernels.spec import attention, rope
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator

from .kv_cases import MODES, empty_cache, tables

ops = torch.ops.llmqat
NAN = float("nan")


def through(k, v, cos, sin, positions, bits, mode, clip=None):
    return ops.rope_fake_quantize(k, v, cos, sin, positions, bits, mode == "paper", clip)


def random_case(dtype=torch.float32, n=4, heads=2, head_dim=8, seed=0):
    k, v = (torch.randn(2, n, heads, head_dim, generator=generator(seed)) * 2).to(dtype)
    return k, v, *tables(n + 3, head_dim), torch.arange(n - 1, -1, -1)


def test_hand_written_numbers(backend):
    # 2 bits: codes -1, 0, 1. A quarter turn maps (a, b) to (-b, a).
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    k = torch.tensor([[[4.0, 1.0], [1.0, 3.0]]])
    v = torch.tensor([[[-2.0, 0.5], [8.0, 5.0]]])
    turned = torch.tensor([1])
    keys, values = through(k, v, cos, sin, turned, 2, "paper")  # scales 4 and 8 for both heads
    assert_same_bits(keys, torch.tensor([[[0.0, 4.0], [-4.0, 0.0]]]))
    assert_same_bits(values, torch.tensor([[[0.0, 0.0], [8.0, 8.0]]]))
    keys, values = through(k, v, cos, sin, turned, 2, "serving")  # scales 4, 3 and 2, 8
    assert_same_bits(keys, torch.tensor([[[0.0, 4.0], [-3.0, 0.0]]]))
    assert_same_bits(values, torch.tensor([[[-2.0, 0.0], [8.0, 8.0]]]))
    keys, values = through(k, v, cos, sin, turned, 16, "serving")
    assert_same_bits(keys, torch.tensor([[[-1.0, 4.0], [-3.0, 1.0]]]))
    assert_same_bits(values, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_it_is_what_attention_reads_from_the_cache(backend, dtype, mode, bits):
    k, v, cos, sin, _ = random_case(dtype)
    n, heads, head_dim = k.shape
    positions = torch.arange(n)
    cache = empty_cache(1, heads, n, head_dim, 16 if bits == 16 else 8, mode, "zero", dtype)
    places = (torch.zeros(n, dtype=torch.int64), positions, bits, mode == "paper")
    rope.rope_quantize_append(k, v, cos, sin, *cache, *places)
    read = [
        attention.cached_rows(codes, scale, 0, n, head_dim, bits, mode == "paper", dtype)
        for codes, scale in (cache[:2], cache[2:])
    ]
    if mode == "paper" and bits != 16:
        read[0] = rope.rotate(read[0], cos[:n], sin[:n])
    got = through(k, v, cos, sin, positions, bits, mode)
    for name, a, b in zip(("keys", "values"), got, read, strict=True):
        assert_same_bits(a, b.transpose(0, 1), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_backend_equals_the_formula(backend, dtype, mode, bits):
    k, v, cos, sin, positions = random_case(dtype, heads=3, head_dim=6, seed=bits)
    k[1], v[2, 0, 0] = 0, NAN
    want = rope.rope_fake_quantize(k, v, cos, sin, positions, bits, mode == "paper")
    for a, b in zip(through(k, v, cos, sin, positions, bits, mode), want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("mode, touched", [("paper", 2), ("serving", 1)])
def test_a_scale_belongs_to_one_token_or_one_head_of_it(backend, mode, touched):
    k, v, cos, sin, positions = random_case()
    first = through(k, v, cos, sin, positions, 4, mode)
    k[1, 0, 0] = v[1, 0, 0] = 1e3
    second = through(k, v, cos, sin, positions, 4, mode)
    for a, b in zip(first, second, strict=True):
        changed = (a != b).any(-1)
        assert changed.sum() == touched and changed[1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_straight_through_and_turned_back(backend, dtype, mode):
    k, v, cos, sin, positions = random_case(dtype)
    k, v = k.requires_grad_(), v.requires_grad_()
    keys, values = through(k, v, cos, sin, positions, 4, mode)
    grad_k, grad_v = torch.randn(2, *k.shape, generator=generator(7)).to(dtype)
    torch.autograd.backward((keys, values), (grad_k, grad_v))
    # The transposed rotation is the rotation by the negative angle.
    assert_same_bits(k.grad, rope.rope(grad_k, cos, -sin, positions))
    assert_same_bits(v.grad, grad_v)


@pytest.mark.parametrize("mode", MODES)
def test_clipped_gradient(backend, mode):
    """Zero where the quantizer's input, not the turned one, reaches the clip."""
    clip = 1.5
    k, v, cos, sin, positions = random_case()
    k, v = k.requires_grad_(), v.requires_grad_()
    keys, values = through(k, v, cos, sin, positions, 4, mode, clip)
    grad = torch.randn(k.shape, generator=generator(8))
    torch.autograd.backward((keys, values), (grad, grad))
    assert_same_bits(v.grad, torch.where(v.abs() < clip, grad, 0.0))
    if mode == "paper":
        back = rope.rope(grad, cos, -sin, positions)
        assert_same_bits(k.grad, torch.where(k.abs() < clip, back, 0.0))
    else:
        turned = rope.rope(k.detach(), cos, sin, positions)
        kept = torch.where(turned.abs() < clip, grad, 0.0)
        assert_same_bits(k.grad, rope.rope(kept, cos, -sin, positions))


def test_gradient_of_width_16_ignores_the_clip(backend):
    k, v, cos, sin, positions = random_case()
    k, v = k.requires_grad_(), v.requires_grad_()
    keys, values = through(k, v, cos, sin, positions, 16, "serving", 0.1)
    (keys.sum() + values.sum()).backward()
    ones = torch.ones_like(k)
    assert_same_bits(k.grad, rope.rope(ones, cos, -sin, positions))
    assert_same_bits(v.grad, ones)


def test_no_tokens(backend):
    k, v, cos, sin, positions = random_case()
    keys, values = through(k[:0], v[:0], cos, sin, positions[:0], 8, "paper")
    assert keys.shape == values.shape == (0, 2, 8)


def test_bad_arguments_name_the_argument():
    k, v, cos, sin, positions = random_case()
    for message, changed in (
        ("v: expected shape", {"v": v[:2]}),
        ("positions: expected shape", {"positions": positions[:2]}),
        ("bits: 9", {"bits": 9}),
        ("mode: 'fast'", {"mode": "fast"}),
    ):
        arguments = {"k": k, "v": v, "positions": positions, "bits": 8, "mode": "paper", **changed}
        with pytest.raises(InvalidArgument, match=message):
            rope_fake_quantize(cos=cos, sin=sin, **arguments)
