"""The CUDA linears with integer activations, on the CPU: bit for bit as spec 7 and 14 for any cut
of the work."""

import ctypes

import pytest
import torch

from llmqat_kernels.spec import activation
from llmqat_kernels.spec import linear as spec
from llmqat_kernels.testing import assert_same_bits, generator
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.linear import DTYPES, Problem, case, layout, run
from tests.emulator.memory import guard

pytestmark = pytest.mark.emulator


@pytest.fixture(scope="module")
def kernels():
    return compile_kernel("quantized_linear")


# m, n, k, multiprocessors: every token tile with tails, two launches, one and many cuts.
SHAPES = [
    (1, 1, 1, 1),
    (2, 16, 32, 1),
    (7, 33, 64, 2),
    (8, 32, 96, 1),
    (9, 48, 100, 1),
    (16, 300, 257, 1),
    (33, 16, 1100, 3),
    (64, 130, 530, 1),
    (70, 32, 128, 1),
    (3, 5, 0, 1),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m, n, k, sms", SHAPES)
def test_integer_linear_equals_spec(kernels, m, n, k, sms, bits):
    kernels.use_schedule(SCHEDULES[(m + bits) % len(SCHEDULES)])
    a, sx, w, sw = case(m, n, k, bits)
    packed = layout(w, bits == 4)
    dtype = list(DTYPES)[(m + n) % 3]
    bias = torch.randn(n, generator=generator(1)).to(dtype) if m % 2 else None
    want = spec.quantized_matmul(a, sx, w, sw, bias, bits, -1, dtype)
    got = run(kernels, a, sx, packed, sw, dtype, nibbles=bits == 4, sms=sms, bias=bias)
    assert_same_bits(got, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_cut_gives_the_same_bits(kernels, schedule):
    kernels.use_schedule(schedule)
    a, sx, w, sw = case(5, 260, 1300, 4)
    want = spec.quantized_matmul(a, sx, w, sw, None, 4, -1, torch.float32)
    packed = layout(w, True)
    for sms in (1, 2, 4):
        assert_same_bits(
            run(kernels, a, sx, packed, sw, torch.float32, nibbles=True, sms=sms), want
        )


# m, n, k, multiprocessors, blocks on each: groups that all blocks share before each has whole ones
# of its own (at 8 tokens a group is 32 channels, beyond it is 128), or that they share alone.
CUTS = [
    (3, 150, 1900, 1, 3),
    (8, 96, 5120, 2, 2),
    (2, 40, 2060, 3, 8),
    (12, 600, 530, 1, 3),
    (40, 384, 1290, 2, 2),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("m, n, k, sms, per_sm", CUTS)
def test_cut_groups_and_whole_ones(kernels, monkeypatch, m, n, k, sms, per_sm, schedule):
    kernels.use_schedule(schedule)
    monkeypatch.setenv("LLMQAT_LINEAR_BLOCKS_PER_SM", str(per_sm))
    bits = 4 if SCHEDULES.index(schedule) % 2 == 0 or m == 3 else 8
    a, sx, w, sw = case(m, n, k, bits)
    want = spec.quantized_matmul(a, sx, w, sw, None, bits, -1, torch.float32)
    packed = layout(w, bits == 4)
    got = run(kernels, a, sx, packed, sw, want.dtype, nibbles=bits == 4, sms=sms)
    assert_same_bits(got, want)


@pytest.mark.parametrize("wanted", ["", "0", "-1", "many", "100"])
def test_any_wish_for_blocks_is_safe(kernels, monkeypatch, wanted):
    """The workspace that `run` makes has the slots of the documented most."""
    kernels.use_schedule("reverse")
    monkeypatch.setenv("LLMQAT_LINEAR_BLOCKS_PER_SM", wanted)
    for m in (2, 20, 40):
        a, sx, w, sw = case(m, 300, 800, 4)
        want = spec.quantized_matmul(a, sx, w, sw, None, 4, -1, torch.float32)
        got = run(kernels, a, sx, layout(w, True), sw, want.dtype, nibbles=True, sms=1)
        assert_same_bits(got, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_worst_case_accumulators(kernels, bits):
    """All codes extreme, of both signs, at a K where fp32 accumulation would be wrong."""
    kernels.use_schedule("forward")
    top, k = 7 if bits == 4 else 127, 1100
    a = torch.full((3, k), 127, dtype=torch.int8)
    a[1] = -127
    a[2, ::2] = -127
    w = torch.full((34, k), top, dtype=torch.int8)
    w[8:16], w[20:24], w[24:, ::3] = -top, -top, -top
    sx, sw = torch.ones(3), torch.ones(34)
    got = run(kernels, a, sx, layout(w, bits == 4), sw, torch.float32, nibbles=bits == 4)
    assert_same_bits(got.double(), (a.double() @ w.double().T).float().double())


def test_largest_k_does_not_overflow(kernels):
    """Bytes are 16 times a code: the raw sums come within 3 % of 2^31."""
    kernels.use_schedule("forward")
    a = torch.full((1, 131071), 127, dtype=torch.int8)
    w = torch.full((4, 131071), 7, dtype=torch.int8)
    w[1] = w[3] = -7
    got = run(
        kernels, a, torch.ones(1), layout(w, True), torch.ones(4), torch.float32, nibbles=True
    )
    want = torch.tensor([[7.0, -7.0, 7.0, -7.0]], dtype=torch.float64) * 127 * 131071
    assert_same_bits(got, want.float())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others(kernels, bits):
    kernels.use_schedule("shuffled")
    a, sx, w, sw = case(64, 40, 390, bits)
    packed, nibbles = layout(w, bits == 4), bits == 4
    whole = run(kernels, a, sx, packed, sw, torch.bfloat16, nibbles=nibbles)
    for rows in (slice(0, 1), slice(5, 14), slice(40, 64)):
        part = a[rows].contiguous()
        got = run(kernels, part, sx[rows].clone(), packed, sw, torch.bfloat16, nibbles=nibbles)
        assert_same_bits(got, whole[rows])


def test_nan_scale_poisons_its_row_alone(kernels):
    kernels.use_schedule("greedy")
    a, sx, w, sw = case(4, 20, 200, 4)
    clean = run(kernels, a, sx, layout(w, True), sw, torch.float16, nibbles=True)
    sx[2] = float("nan")
    got = run(kernels, a, sx, layout(w, True), sw, torch.float16, nibbles=True)
    assert got[2].isnan().all()
    assert_same_bits(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_gate_and_up_finish_as_silu_mul(kernels, dtype, bits):
    kernels.use_schedule("lagging")
    for m, n, k in ((3, 46, 300), (10, 64, 520)):
        a, sx, w, sw = case(m, n, k, bits)
        bias = torch.randn(n, generator=generator(2))
        y = spec.quantized_matmul(a, sx, w, sw, bias, bits, -1, dtype)
        want = activation.silu_mul(y[:, : n // 2], y[:, n // 2 :])
        packed, options = layout(w, bits == 4), {"bias": bias, "silu_mul": True}
        got = run(kernels, a, sx, packed, sw, dtype, nibbles=bits == 4, **options)
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_added_after_the_cast(kernels, dtype):
    kernels.use_schedule("reverse")
    a, sx, w, sw = case(6, 36, 140, 4)
    residual = torch.randn(6, 36, generator=generator(3)).to(dtype)
    y = spec.quantized_matmul(a, sx, w, sw, None, 4, -1, dtype)
    want = (y.float() + residual.float()).to(dtype)
    options = {"nibbles": True, "residual": residual}
    assert_same_bits(run(kernels, a, sx, layout(w, True), sw, dtype, **options), want)


def test_reads_nothing_beyond_its_inputs(kernels):
    """`run` puts each input in front of a page that faults; rows and columns end with it."""
    kernels.use_schedule("forward")
    for bits in (4, 8):
        a, sx, w, sw = case(3, 20, 144, bits)
        want = spec.quantized_matmul(a, sx, w, sw, None, bits, -1, torch.float32)
        packed = layout(w, bits == 4)
        assert_same_bits(run(kernels, a, sx, packed, sw, want.dtype, nibbles=bits == 4), want)


def test_unaligned_activations(kernels):
    kernels.use_schedule("shuffled")
    a, sx, w, sw = case(4, 32, 64, 4)
    memory = guard(torch.zeros(a.numel() + 3, dtype=torch.int8))
    moved = memory.tensor[3:].view(a.shape).copy_(a)
    want = spec.quantized_matmul(a, sx, w, sw, None, 4, -1, torch.float32)
    got = run(kernels, moved, sx, layout(w, True), sw, torch.float32, nibbles=True)
    assert_same_bits(got, want)


def test_refused(kernels):
    empty = Problem(m=0, n=3, k=4, sms=1)
    assert kernels.llmqat_cuda_integer_linear(ctypes.byref(empty), None) == 0
    too_long = Problem(m=1, n=1, k=131072, sms=1, nibbles=True)
    assert kernels.llmqat_cuda_integer_linear(ctypes.byref(too_long), None) != 0
    too_wide = Problem(m=1, n=1, k=4, sms=1025, nibbles=True)
    assert kernels.llmqat_cuda_integer_linear(ctypes.byref(too_wide), None) != 0
