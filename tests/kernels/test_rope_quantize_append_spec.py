"""rope and rope_quantize_append: spec 9, the formula and every instruction set against it."""

import pytest
import torch

from llmqat_kernels.spec import rope as spec
from llmqat_kernels.spec.int4 import pack_int4
from llmqat_kernels.spec.quantize import quantize
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator

from .kv_cases import MODES, empty_cache, fill, tables

native = torch.ops.llmqat_cpu
HEAD_DIMS = (2, 6, 34, 64, 128)


def test_hand_written_rotation():
    cos, sin = torch.tensor([[0.0], [0.5]]), torch.tensor([[1.0], [0.25]])
    x = torch.tensor([[[2.0, 4.0]]])
    assert spec.rope(x, cos, sin, torch.tensor([0])).tolist() == [[[-4.0, 2.0]]]
    assert spec.rope(x, cos, sin, torch.tensor([1])).tolist() == [[[0.0, 2.5]]]


def test_position_zero_is_the_identity_and_norms_are_kept():
    cos, sin = tables(10, 64)
    x = torch.randn(3, 2, 64, generator=generator(0))
    assert_same_bits(spec.rope(x, cos, sin, torch.zeros(3, dtype=torch.int64)), x)
    y = spec.rope(x, cos, sin, torch.tensor([1, 5, 9]))
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_native_rope_equals_spec(isa, dtype, head_dim):
    cos, sin = tables(50, head_dim)
    x = (torch.randn(20, 3, head_dim, generator=generator(1)) * 4).to(dtype)
    x[3, 0, 0], x[4, 1, 1] = float("nan"), float("inf")
    positions = torch.randint(0, 50, (20,), generator=generator(2))
    want = spec.rope(x, cos, sin, positions)
    assert_same_bits(native.rope(x, cos, sin, positions), want)
    assert_same_bits(
        native.rope(x.transpose(0, 1).contiguous().transpose(0, 1), cos, sin, positions), want
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_spec_stores_the_codes_of_quantize(bits, mode):
    cache = empty_cache(2, 3, 5, 8, bits, mode)
    k, v = fill(spec.rope_quantize_append, cache, [5, 2], 3, 8, bits, mode, torch.float32)
    cos, sin = tables(5, 8)
    token, slot, position = 6, 1, 1
    key = k if mode == "paper" else spec.rope(k, cos, sin, torch.tensor([0, 1, 2, 3, 4, 0, 1]))
    for x, codes_cache, scale_cache in ((key, cache[0], cache[1]), (v, cache[2], cache[3])):
        codes, scale = quantize(x[token].reshape(-1) if mode == "paper" else x[token], bits)
        codes = codes.reshape(3, 8)
        assert_same_bits(codes_cache[slot, :, position], pack_int4(codes) if bits == 4 else codes)
        assert_same_bits(scale_cache[slot, ..., position], scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_native_equals_spec_and_touches_nothing_else(isa, dtype, mode, bits, head_dim):
    caches = []
    for op in (native.rope_quantize_append, spec.rope_quantize_append):
        cache = empty_cache(3, 3, 7, head_dim, bits, mode, "random")
        fill(op, cache, [7, 0, 3], 3, head_dim, bits, mode, dtype, seed=4)
        caches.append(cache)
    for name, a, b in zip(("k_codes", "k_scale", "v_codes", "v_scale"), *caches, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("float_dtype", DTYPES)
def test_float_caches_of_any_dtype(isa, float_dtype):
    caches = []
    for op in (native.rope_quantize_append, spec.rope_quantize_append):
        cache = empty_cache(1, 2, 4, 6, 16, "serving", "zero", float_dtype)
        fill(op, cache, [4], 2, 6, 16, "serving", torch.bfloat16)
        caches.append(cache)
    for a, b in zip(*caches, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_other_widths_in_int8_caches(isa, bits, mode):
    caches = []
    for op in (native.rope_quantize_append, spec.rope_quantize_append):
        cache = empty_cache(1, 2, 4, 16, 8, mode, "zero")
        fill(op, cache, [4], 2, 16, bits, mode, torch.float32)
        caches.append(cache)
    for a, b in zip(*caches, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_a_poisoned_token_is_nan_and_alone(isa, mode):
    cache = empty_cache(1, 2, 3, 8, 8, mode, "zero")
    cos, sin = tables(3, 8)
    k, v = torch.randn(2, 3, 2, 8, generator=generator(5))
    k[1, 0, 3] = float("nan")
    rows = torch.arange(3)
    native.rope_quantize_append(
        k, v, cos, sin, *cache, torch.zeros_like(rows), rows, 8, mode == "paper"
    )
    scales = cache[1][0] if mode == "paper" else cache[1][0, 0]
    assert scales.isnan().tolist() == [False, True, False]
    assert (cache[0][0, 0, 1] == 0).all() and cache[3].isfinite().all()


def test_bad_arguments_name_the_argument(isa):
    cache = empty_cache(2, 3, 5, 8, 8, "serving", "zero")
    before = [t.clone() for t in cache]
    cos, sin = tables(5, 8)
    k = torch.randn(2, 3, 8)
    good = torch.tensor([0, 1])
    append = native.rope_quantize_append

    def call(k=k, v=k, cos=cos, cache=cache, slots=good, positions=good, bits=8, paper=False):
        append(k, v, cos, sin, *cache, slots, positions, bits, paper)

    strided = (cache[0].transpose(1, 2).contiguous().transpose(1, 2), *cache[1:])
    for message, arguments in [
        ("slots: 2", {"slots": torch.tensor([0, 2])}),
        ("slots: -1", {"slots": torch.tensor([-1, 0])}),
        ("positions: 5", {"positions": torch.tensor([0, 5])}),
        ("slots: expected int64", {"slots": good.int()}),
        ("k: ", {"k": torch.randn(2, 2, 8)}),
        ("v: ", {"v": torch.randn(2, 3, 8, dtype=torch.bfloat16)}),
        ("cos: expected size 4", {"cos": cos[:, :3]}),
        ("cos: expected at least 2 rows", {"cos": cos[:1]}),
        ("bits: expected 2 to 8", {"bits": 9}),
        ("k_codes: expected float32", {"bits": 16}),
        ("k_scale: ", {"paper": True}),
        ("k_codes: expected a contiguous", {"cache": strided}),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
    for a, b in zip(cache, before, strict=True):
        assert_same_bits(a, b, "a refused call wrote something")
