"""The CUDA product with integer group scales on the CPU, bit for bit as spec 18: the code paths of
sm_80 (int4 MMA) and of sm_90 (codes expanded to int8)."""

import ctypes

import pytest
import torch

from llmqat_kernels.spec import int4, linear
from llmqat_kernels.testing import assert_same_bits, generator
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.memory import guard, poisoned

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMS = 2  # a small device, so that small shapes have several tiles and are not always split

pytestmark = pytest.mark.emulator


class Problem(ctypes.Structure):
    """LlmqatInt4Linear of csrc/cuda/int4_linear.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("a", "a_scale", "w", "multiplier", "w_scale", "bias")]
        + [(name, ctypes.c_void_p) for name in ("y", "workspace", "tickets")]
        + [(name, ctypes.c_int64) for name in ("m", "n", "k", "group_size")]
        + [(name, ctypes.c_int) for name in ("dtype", "bias_dtype")]
        + [(name, ctypes.c_bool) for name in ("a_packed", "w_packed")]
        + [(name, ctypes.c_int) for name in ("token_tile", "splits")]
    )


@pytest.fixture(scope="module", params=[80, 90])
def kernel(request):
    library = compile_kernel("int4_linear", request.param)
    long = ctypes.c_int64
    library.plan.argtypes = [long, long, long, ctypes.c_bool, long, ctypes.POINTER(long)]
    library.plan.restype = None
    library.llmqat_cuda_int4_linear.argtypes = [ctypes.POINTER(Problem), ctypes.c_void_p]
    library.llmqat_cuda_int4_is_regular.argtypes = [ctypes.POINTER(Problem)]
    library.llmqat_cuda_int4_is_regular.restype = ctypes.c_bool
    return library


def codes(bits, *shape, seed):
    limit = 2 ** (bits - 1)
    random = torch.randint(1 - limit, limit, shape, generator=generator(seed))
    return random.to(torch.int8)


def multiply(library, a, a_scale, w, multiplier, w_scale, bias, group_size, dtype, splits=None):
    """Run the launcher as the binding does; every operand lies on guarded pages.

    Returns y and the problem, with the plan in it; ``splits`` overrides the plan's.
    """
    m, n, k = a.shape[0], w.shape[0], multiplier.shape[1] * group_size
    operands = (a, a_scale, w, multiplier, w_scale, bias)
    kept = [None if t is None else guard(t) for t in operands]
    y = poisoned((m, n), dtype)
    problem = Problem(
        *(held and held.pointer for held in kept), y.pointer, None, None,
        m, n, k, group_size, DTYPES[dtype], DTYPES[bias.dtype] if bias is not None else 0,
        a.dtype == torch.uint8, w.dtype == torch.uint8, 0, 1,
    )  # fmt: skip
    regular = library.llmqat_cuda_int4_is_regular(ctypes.byref(problem))
    plan = (ctypes.c_int64 * 4)()
    library.plan(m, n, k, regular, SMS, plan)
    problem.token_tile, problem.splits = plan[0], splits or plan[1]
    tile = problem.token_tile * (64 if problem.token_tile == 8 else 128)
    words = plan[2] * problem.splits * tile if problem.splits > 1 else 0
    workspace = poisoned((words,), torch.int32)
    tickets = guard(torch.zeros(plan[2], dtype=torch.int32))
    problem.workspace, problem.tickets = workspace.pointer, tickets.pointer
    assert library.llmqat_cuda_int4_linear(ctypes.byref(problem), None) == 0
    for held in (workspace, tickets, *filter(None, kept)):
        held.check()
    return y.check(), problem


def check(library, m, n, k, group_size, a_bits=4, dtype=torch.bfloat16, bias=None, **options):
    """The kernel equals the spec on random codes; returns the problem it solved."""
    a, w = codes(a_bits, m, k, seed=m + k), codes(4, n, k, seed=n)
    multiplier = torch.randint(1, 64, (n, k // group_size), generator=generator(3)).to(torch.uint8)
    a_scale, w_scale = torch.rand(m, generator=generator(4)), torch.rand(n, generator=generator(5))
    scales = (multiplier, w_scale, bias, group_size, dtype)
    want = linear.integer_group_matmul(a, a_scale, w, *scales)
    stored = int4.pack_int4(a) if a_bits == 4 else a
    got, problem = multiply(library, stored, a_scale, int4.pack_int4(w), *scales, **options)
    assert_same_bits(got, want)
    return problem


@pytest.mark.parametrize("a_bits", [4, 8])
@pytest.mark.parametrize(
    "m, n, k, group_size",
    [
        (1, 64, 256, 128),  # one tile, one stage
        (8, 65, 1280, 64),  # a second tile of one channel; k split
        (3, 40, 448, 448),  # fewer channels than a tile; k ends inside a stage
        (9, 130, 384, 128),  # the tile for more tokens, with tails on both sides
        (70, 20, 192, 64),  # a second token tile
    ],
)
def test_tiles_equal_spec(kernel, m, n, k, group_size, a_bits):
    problem = check(kernel, m, n, k, group_size, a_bits)
    assert problem.token_tile == (8 if m <= 8 else 64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(kernel, schedule):
    kernel.use_schedule(schedule)
    bias = torch.randn(66, generator=generator(9)).to(torch.float16)
    # Two tiles, three parts of k each (the last block of a tile differs by schedule), five stages.
    for a_bits in (4, 8):
        check(kernel, 5, 66, 1280, 128, a_bits, torch.float32, bias, splits=3)
    check(kernel, 17, 20, 1280, 64, 4, torch.float16, bias[:20], splits=1)
    kernel.use_schedule("forward")


@pytest.mark.parametrize("m, k", [(2, 38_336), (9, 2112)])
def test_longest_sum(kernel, m, k):
    """Largest codes and multipliers, at nearly the largest K: 63 * 7 * 127 * K < 2^31."""
    for value, a_bits in ((127, 8), (7, 4)):
        a = torch.full((m, k), value, dtype=torch.int8)
        a[1] = -value
        w = torch.full((1, k), 7, dtype=torch.int8)
        multiplier = torch.full((1, k // 64), 63, dtype=torch.uint8)
        one = torch.ones(m), multiplier, torch.ones(1)
        stored = int4.pack_int4(a) if a_bits == 4 else a
        got, problem = multiply(
            kernel, stored, one[0], int4.pack_int4(w), *one[1:], None, 64, torch.float32
        )
        assert problem.splits > 1
        want = torch.tensor(63 * 7 * value * k, dtype=torch.int32).to(torch.float32)
        assert got[0] == want and got[1] == -want


def test_every_pair_of_codes(kernel):
    """All products of two 4-bit codes, -8 included, which the formats hold and nobody writes."""
    values = torch.arange(-8, 8, dtype=torch.int8)
    a = values.view(16, 1).repeat(1, 64)
    w = torch.zeros(16, 64, dtype=torch.int8)
    w[torch.arange(16), torch.arange(16) * 4 + torch.arange(16) % 4] = values
    one = torch.ones(16)
    multiplier = torch.ones(16, 1, dtype=torch.uint8)
    packed = int4.pack_int4(a), one, int4.pack_int4(w), multiplier, one
    got, _ = multiply(kernel, *packed, None, 64, torch.float32)
    assert torch.equal(got, values.view(16, 1).float() * values.float())


@pytest.mark.parametrize("group_size", [1, 3, 15, 32])
def test_any_layout(kernel, group_size):
    """Groups that no tile fits, odd K, int8 storage of either side."""
    k = 2 * group_size + group_size * (group_size % 2)
    multiplier = torch.randint(1, 64, (5, k // group_size), generator=generator(1)).to(torch.uint8)
    a, w = codes(4, 3, k, seed=1), codes(4, 5, k, seed=2)
    scales = torch.rand(3), torch.rand(5)
    for stored_a in (a, int4.pack_int4(a)):
        for stored_w in (w, int4.pack_int4(w)):
            rest = (multiplier, scales[1], None, group_size, torch.bfloat16)
            got, problem = multiply(kernel, stored_a, scales[0], stored_w, *rest)
            assert problem.token_tile == 0
            assert_same_bits(got, linear.integer_group_matmul(a, scales[0], w, *rest))


def test_misaligned_operands_take_the_plain_kernel(kernel):
    problem = Problem(w_packed=True, a_packed=True, group_size=64)
    for offset_a, offset_w in ((0, 0), (8, 0), (0, 4)):
        problem.a, problem.w = 4096 + offset_a, 8192 + offset_w
        regular = kernel.llmqat_cuda_int4_is_regular(ctypes.byref(problem))
        assert regular == (offset_a == offset_w == 0)


def test_a_row_does_not_depend_on_the_others(kernel):
    a, w = codes(4, 20, 512, seed=1), int4.pack_int4(codes(4, 24, 512, seed=2))
    multiplier = torch.randint(1, 64, (24, 4), generator=generator(3)).to(torch.uint8)
    sx, sw = torch.rand(20), torch.rand(24)
    packed = int4.pack_int4(a)
    together, _ = multiply(kernel, packed, sx, w, multiplier, sw, None, 128, torch.float32)
    alone, _ = multiply(
        kernel, packed[13:14].contiguous(), sx[13:14], w, multiplier, sw, None, 128, torch.float32
    )
    assert_same_bits(alone[0], together[13])


def test_empty(kernel):
    for m, n in ((0, 3), (3, 0)):
        check(kernel, m, n, 64, 64)
