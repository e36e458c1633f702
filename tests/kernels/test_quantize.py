"""quantize, dequantize, fake_quantize: spec 1-6."""

import math

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import quantize as spec
from llmqat_kernels.testing import (
    DTYPES,
    ROW_LENGTHS,
    assert_same_bits,
    generator,
    layouts,
    special_rows,
    tie_row,
)

BITS = tuple(range(2, 9))


def test_hand_written_codes(backend):
    codes, scale = qk.quantize(torch.tensor([[7.0, -3.5, 0.49, 0.5, 1.5, 2.5]]), 4)
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[7, -4, 0, 0, 2, 2]]  # ties go to the even code


def test_scale_is_the_rounded_quotient(backend):
    x = torch.randn(2000, 3, generator=generator(0))
    _, scale = qk.quantize(x, 8)
    for value, amax in zip(scale.tolist(), x.abs().amax(-1).tolist(), strict=True):
        exact = torch.tensor(amax / 127, dtype=torch.float64).to(
            torch.float32
        )  # fp64 quotient rounds correctly
        assert value == exact.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", ROW_LENGTHS)
def test_backends_equal_spec(backend, dtype, columns):
    x = special_rows(columns, dtype)
    # The bit width is a constant of one kernel; Triton's interpreter is slow and runs three.
    for bits in (2, 4, 8) if backend == "triton" else BITS:
        for bf16_scale in (False, True):
            codes, scale = qk.quantize(
                x, bits, scale_dtype=torch.bfloat16 if bf16_scale else torch.float32
            )
            want_codes, want_scale = spec.quantize(x, bits, -1, bf16_scale)
            assert_same_bits(codes, want_codes, f"codes of {bits} bits")
            assert_same_bits(scale, want_scale, f"scales of {bits} bits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 3, 16, 32, 64])
def test_groups_are_rows(backend, dtype, group_size):
    x = torch.randn(5, 4 * group_size, generator=generator(group_size)).to(dtype)
    codes, scale = qk.quantize(x, 4, group_size=group_size)
    want_codes, want_scale = qk.quantize(x.reshape(20, group_size), 4)
    assert_same_bits(codes, want_codes.reshape(codes.shape))
    assert_same_bits(scale, want_scale.reshape(5, 4))
    assert_same_bits(
        qk.dequantize(codes, scale, group_size=group_size, dtype=dtype),
        spec.dequantize(codes, scale, group_size, dtype),
    )


def test_poisoned_rows_never_turn_finite(backend):
    x = special_rows(33, torch.float32)
    codes, scale = qk.quantize(x, 8)
    bad = ~torch.isfinite(x).all(-1)
    assert bad.sum() == 3
    assert scale[bad].isnan().all() and (codes[bad] == 0).all()
    assert qk.fake_quantize(x, 8)[bad].isnan().all()
    alone, _ = qk.quantize(x[~bad], 8)
    assert_same_bits(codes[~bad], alone, "neighbours of a poisoned row")


def test_zero_rows(backend):
    codes, scale = qk.quantize(torch.zeros(3, 8), 4)
    assert scale.tolist() == [1.0] * 3 and codes.abs().sum() == 0
    below = torch.full((1, 8), 2.0**-101)
    assert qk.quantize(below, 4)[1].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_amax_reaches_exactly_qmax(backend, dtype):
    values = torch.arange(1, 0x7F80 if dtype == torch.bfloat16 else 0x7C00, dtype=torch.int32)
    amax = values.to(torch.int16).view(dtype)
    amax = amax[amax.float() >= spec.ZERO_ROW_AMAX]
    for bits in (2, 4, 8) if backend == "triton" else BITS:  # interpreted: fewer, for time
        codes, _ = qk.quantize(amax.unsqueeze(1), bits)
        assert (codes == spec.qmax(bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_constructed_ties_round_to_even(backend, bits):
    row = tie_row(4096, bits)
    scales = 2.0 ** torch.arange(-20, 20, dtype=torch.float32)
    codes, scale = qk.quantize(row * scales.unsqueeze(1), bits)
    assert_same_bits(scale, scales)
    limit = spec.qmax(bits)
    halves = row[1:].double()
    even = torch.where(torch.floor(halves) % 2 == 0, torch.floor(halves), torch.ceil(halves))
    assert (codes[:, 1:].double() == even.clamp(-limit, limit)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_do_not_matter(backend, dtype):
    x = torch.randn(6, 34, generator=generator(5)).to(dtype)
    want = qk.quantize(x, 8), qk.fake_quantize(x, 4)
    for name, view in layouts(x):
        codes, scale = qk.quantize(view, 8)
        assert_same_bits(codes, want[0][0], name)
        assert_same_bits(scale, want[0][1], name)
        assert_same_bits(qk.fake_quantize(view, 4), want[1], name)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(backend, shape):
    x = torch.empty(shape)
    codes, scale = qk.quantize(x, 8)
    assert codes.shape == shape and scale.shape == shape[:-1]
    assert qk.fake_quantize(x, 8).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_dequantized_quantize(backend, dtype):
    x = special_rows(65, dtype)
    for bits in BITS:
        codes, scale = qk.quantize(x, bits)
        assert_same_bits(qk.fake_quantize(x, bits), qk.dequantize(codes, scale, dtype=dtype))


def test_error_is_at_most_half_a_step(backend):
    x = torch.randn(64, 100, generator=generator(1))
    codes, scale = qk.quantize(x, 8)
    error = (x.double() - codes.double() * scale.double().unsqueeze(1)).abs()
    assert (error <= scale.double().unsqueeze(1) * (0.5 + 1e-5)).all()


def test_straight_through_gradient(backend):
    x = torch.randn(4, 32, generator=generator(2)).mul_(2).requires_grad_()
    upstream = torch.randn(4, 32, generator=generator(3))
    (qk.fake_quantize(x, 4) * upstream).sum().backward()
    assert_same_bits(x.grad, upstream)
    x.grad = None
    (qk.fake_quantize(x, 4, ste_clip=2.0) * upstream).sum().backward()
    assert_same_bits(x.grad, torch.where(x.detach().abs() < 2.0, upstream, torch.zeros(())))


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (dict(bits=1), qk.InvalidArgument, "bits"),
        (dict(bits=9), qk.InvalidArgument, "bits"),
        (dict(bits=16), qk.InvalidArgument, "bits"),
        (dict(bits=True), qk.InvalidArgumentType, "bits"),
        (dict(bits=4.0), qk.InvalidArgumentType, "bits"),
        (dict(bits=None), qk.InvalidArgumentType, "bits"),
        (dict(group_size=0), qk.InvalidArgument, "group_size"),
        (dict(group_size=-2), qk.InvalidArgument, "group_size"),
        (dict(group_size=5), qk.InvalidArgument, "group_size"),
        (dict(group_size="a"), qk.InvalidArgumentType, "group_size"),
        (dict(x=torch.ones(2, 8, dtype=torch.int32)), qk.InvalidArgumentType, "x"),
        (dict(x=torch.ones(2, 8, dtype=torch.float64)), qk.InvalidArgumentType, "x"),
        (dict(x=torch.tensor(1.0)), qk.InvalidArgument, "x"),
        (dict(x=[1.0]), qk.InvalidArgumentType, "x"),
        (dict(x=torch.eye(4).to_sparse()), qk.InvalidArgument, "x"),
        (dict(scale_dtype=torch.float16), qk.InvalidArgument, "scale_dtype"),
    ],
)
def test_bad_arguments(backend, change, error, word):
    arguments = {"x": torch.ones(2, 8), "bits": 8} | change
    x, bits = arguments.pop("x"), arguments.pop("bits")
    for op in (qk.quantize, qk.fake_quantize):
        with pytest.raises(error, match=word) as caught:
            op(x, bits, **arguments)
        assert "\n" not in str(caught.value)


def test_bad_dequantize_arguments(backend):
    codes, scale = qk.quantize(torch.ones(2, 8), 8)
    with pytest.raises(qk.InvalidArgument, match="scale"):
        qk.dequantize(codes, scale[:1])
    with pytest.raises(qk.InvalidArgumentType, match="scale"):
        qk.dequantize(codes, scale.double())
    with pytest.raises(qk.InvalidArgument, match="dtype"):
        qk.dequantize(codes, scale, dtype=torch.int8)
    with pytest.raises(qk.InvalidArgument, match="ste_clip"):
        qk.fake_quantize(torch.ones(2, 8), 8, ste_clip=-math.inf)
    for clip, kind in (("a", "str"), (True, "bool"), ([1.0], "list")):
        with pytest.raises(
            qk.InvalidArgumentType, match=f"^ste_clip: expected a number or None, got {kind}$"
        ):
            qk.fake_quantize(torch.ones(2, 8), 8, ste_clip=clip)
    assert qk.fake_quantize(torch.ones(2, 8), 8, ste_clip=2).shape == (2, 8)


def test_instruction_sets_agree_on_many_elements(isa):
    """50 M elements over all instruction sets and bit widths are compared in
    benchmarks/equality.py; a slice here.
    """
    x = torch.randn(257, 2049, generator=generator(9))
    x[::7] *= 1e-20
    x[3, 5] = float("inf")
    for bits in BITS:
        want = spec.quantize(x, bits)
        got = qk.quantize(x, bits)
        assert_same_bits(got[0], want[0], f"codes, {bits} bits")
        assert_same_bits(got[1], want[1], f"scales, {bits} bits")
