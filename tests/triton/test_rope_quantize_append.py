"""RoPE, the write into the cache and its training form on Triton: bit-equal to spec 9, 19."""

import pytest
import torch

from llmqat_kernels import InvalidArgument, InvalidArgumentType
from llmqat_kernels.backends.triton.rope_tiles import head_tile
from llmqat_kernels.spec import rope as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator
from tests.kernels.kv_cases import MODES, empty_cache, fill, tables

from .device import on_cpu, on_device, run
from .guard import guard_bands, poisoned

HEAD_DIMS = (2, 6, 34, 64, 80)


def appended(cache, lengths, heads, head_dim, bits, mode, dtype, **kwargs):
    """``fill`` by the Triton backend: the cache it wrote, on the CPU."""
    held = on_device(cache)

    def op(k, v, cos, sin, *rest):
        run("rope_quantize_append", k, v, cos, sin, *held, *rest[4:])

    fill(op, cache, lengths, heads, head_dim, bits, mode, dtype, **kwargs)
    return on_cpu(held)


def assert_append_equals_spec(
    heads, head_dim, bits, mode, dtype, width=None, store=torch.float32, lengths=(2, 0, 1)
):
    caches = []
    for is_spec in (False, True):
        cache = empty_cache(len(lengths), heads, 5, head_dim, width or bits, mode, "random", store)
        args = (cache, lengths, heads, head_dim, bits, mode, dtype)
        if is_spec:
            fill(spec.rope_quantize_append, *args, seed=4)
        caches.append(cache if is_spec else appended(*args, seed=4))
    for name, got, want in zip(("k_codes", "k_scale", "v_codes", "v_scale"), *caches, strict=True):
        assert_same_bits(got, want, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rope_equals_spec_in_any_layout(dtype, head_dim):
    cos, sin = tables(50, head_dim)
    x = (torch.randn(6, 3, head_dim, generator=generator(1)) * 4).to(dtype)
    x[3, 0, 0], x[4, 1, 1] = float("nan"), float("inf")
    positions = torch.tensor([0, 49, 7, 1, 1, 30])
    want = spec.rope(x, cos, sin, positions)
    wide = torch.cat((x, x[:, :2]), dim=1)  # heads of a wider projection
    layouts = {
        "contiguous": x,
        "view of a projection": wide[:, :3],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided columns": x.repeat_interleave(2, dim=-1)[..., ::2],
    }
    for name, layout in layouts.items():
        with guard_bands():
            assert_same_bits(run("rope", layout, cos, sin, positions), want, name)
    with guard_bands():
        got = run("rope", poisoned(x, 1), poisoned(cos, 1), poisoned(sin, 3), positions)
    assert_same_bits(got, want, "misaligned")


def test_a_position_outside_the_table_rotates_to_nan():
    cos, sin = tables(4, 8)
    x = torch.randn(3, 2, 8, generator=generator(2))
    y = run("rope", x, poisoned(cos), poisoned(sin), torch.tensor([4, 3, -1]))
    assert y.isnan().all(-1).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_append_equals_spec_and_touches_nothing_else(dtype, mode, bits, head_dim):
    assert_append_equals_spec(3, head_dim, bits, mode, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_in_int8_caches(mode, bits):
    assert_append_equals_spec(2, 16, bits, mode, torch.bfloat16, width=8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_in_packed_caches(mode, bits):
    assert_append_equals_spec(2, 16, bits, mode, torch.float16, width=4)


@pytest.mark.parametrize("store", DTYPES)
def test_float_caches_of_any_dtype(store):
    assert_append_equals_spec(2, 6, 16, "serving", torch.bfloat16, store=store)


@pytest.mark.parametrize("heads, head_dim", [(65, 128), (5, 96), (1, 2)])
def test_long_and_short_tokens_with_one_scale(heads, head_dim):
    """8192 and more elements share a scale; head counts that fill no power of two."""
    for bits, mode in ((8, "paper"), (4, "serving")):
        assert_append_equals_spec(heads, head_dim, bits, mode, torch.bfloat16, lengths=(1,))


@pytest.mark.parametrize("mode", MODES)
def test_a_poisoned_token_is_nan_and_alone(mode):
    cache = empty_cache(1, 2, 3, 8, 8, mode, "zero")
    k, v = torch.randn(2, 3, 2, 8, generator=generator(5))
    k[1, 0, 3] = float("nan")
    rows, held = torch.arange(3), on_device(cache)
    args = (torch.zeros_like(rows), rows, 8, mode == "paper")
    run("rope_quantize_append", k, v, *tables(3, 8), *held, *args)
    k_codes, k_scale, _, v_scale = on_cpu(held)
    scales = k_scale[0] if mode == "paper" else k_scale[0, 0]
    assert scales.isnan().tolist() == [False, True, False]
    assert (k_codes[0, 0, 1] == 0).all() and v_scale.isfinite().all()


def test_places_outside_the_cache_are_not_written():
    cache = empty_cache(2, 2, 3, 8, 8, "serving", "zero")
    held = tuple(poisoned(t) for t in cache)
    k = torch.randn(4, 2, 8, generator=generator(6))
    slots, positions = torch.tensor([2, -1, 0, 1]), torch.tensor([0, 0, 3, -1])
    run("rope_quantize_append", k, k, *tables(9, 8), *held, slots, positions, 8, False)
    for got, before in zip(on_cpu(held), cache, strict=True):
        assert_same_bits(got, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_training_form_equals_spec(dtype, mode, bits):
    for heads, head_dim in ((3, 34), (8, 64)):
        cos, sin = tables(9, head_dim)
        k, v = (torch.randn(2, 4, heads, head_dim, generator=generator(bits)) * 3).to(dtype)
        k[1], v[2, 0, 0] = 0, float("inf")
        wide = torch.cat((k, v), dim=1)  # views of one projection
        args = (cos, sin, torch.tensor([0, 8, 3, 5]), bits, mode == "paper")
        want = spec.rope_fake_quantize(k, v, *args)
        with guard_bands():
            got = run("rope_fake_quantize", wide[:, :heads], wide[:, heads:], *args, None)
        for name, a, b in zip(("keys", "values"), got, want, strict=True):
            assert_same_bits(a, b, name)


def test_no_tokens_and_no_heads():
    cos, sin = tables(3, 8)
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, 2, 8)
    assert run("rope", x, cos, sin, none).shape == x.shape
    keys, values = run("rope_fake_quantize", x, x, cos, sin, none, 8, True, None)
    assert keys.shape == values.shape == x.shape
    cache = on_device(empty_cache(1, 2, 3, 8, 8, "serving", "zero"))
    run("rope_quantize_append", x, x, cos, sin, *cache, none, none, 8, False)


def test_bad_arguments_name_the_argument():
    cache = empty_cache(2, 3, 5, 8, 8, "serving", "zero")
    before = [t.clone() for t in cache]
    cos, sin = tables(5, 8)
    k, good = torch.randn(2, 3, 8), torch.tensor([0, 1])

    def call(k=k, v=k, cos=cos, cache=cache, slots=good, positions=good, bits=8, paper=False):
        run("rope_quantize_append", k, v, cos, sin, *cache, slots, positions, bits, paper)

    strided = (cache[0].transpose(1, 2).contiguous().transpose(1, 2), *cache[1:])
    packed = empty_cache(2, 3, 5, 8, 4, "serving", "zero")
    for error, message, arguments in [
        (InvalidArgumentType, "slots: dtype", {"slots": good.int()}),
        (InvalidArgument, "positions: expected shape", {"positions": good[:1]}),
        (InvalidArgument, "k, v: expected 3 heads", {"k": k[:, :2], "v": k[:, :2]}),
        (InvalidArgument, "k, v: expected 3 heads", {"v": k[:1]}),
        (InvalidArgument, "cos: expected shape", {"cos": cos[:, :3]}),
        (InvalidArgumentType, "k_codes: dtype", {"bits": 16}),
        (InvalidArgumentType, "k_codes: dtype torch.uint8", {"cache": packed}),
        (InvalidArgument, "k_scale: expected shape", {"paper": True}),
        (InvalidArgument, "k_codes: expected a contiguous", {"cache": strided}),
    ]:
        with pytest.raises(error, match=message):
            call(**arguments)
    with pytest.raises(InvalidArgument, match="odd"):
        run("rope", torch.randn(2, 3, 5), cos, sin, good)
    for got, want in zip(cache, before, strict=True):
        assert_same_bits(got, want, "a refused call wrote something")


def test_tiles_hold_the_heads_and_refuse_what_does_not_fit():
    for heads, half in ((1, 1), (3, 32), (8, 64), (32, 40), (64, 64)):
        for whole in (False, True):
            tile = head_tile(heads, half, whole)
            assert tile.half_block >= half and (tile.heads >= heads or not whole)
            assert 1 <= tile.num_warps <= 32
            assert 2 * tile.heads * tile.half_block // (32 * tile.num_warps) <= 32
    with pytest.raises(InvalidArgument, match="serving mode"):
        head_tile(257, 64, whole=True)
