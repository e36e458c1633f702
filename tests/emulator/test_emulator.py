"""What the emulator promises: orders, poison, late copies, and a message for every fault."""

import ctypes

import numpy as np
import pytest
import torch

from tests.emulator.build import FAST, ROOT, SCHEDULES, EmulatorError, Kernels, compile_library
from tests.emulator.memory import CANARY, guard, poisoned

pytestmark = pytest.mark.emulator

SOURCE = ROOT / "tests/emulator/faults.cpp"


POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t
SIGNATURES = {
    "trace": [ctypes.c_uint, ctypes.c_uint, POINTER],
    "fresh_shared": [ctypes.c_uint, SIZE, POINTER],
    "copy_timing": [POINTER, POINTER],
    "exchange": [ctypes.c_int, POINTER],
    "big_shared": [SIZE],
    "write_after_shared": [SIZE],
    "write_before_shared": [SIZE],
    "misaligned_copy": [POINTER],
    "copy_outside": [POINTER],
    "unwaited_copy": [POINTER],
    "misaligned_load": [POINTER],
    "read_at": [POINTER],
}


def load(arch=80):
    library = Kernels(compile_library(SOURCE, [*FAST, "-O0", f"-DLLMQAT_EMULATED_ARCH={arch}"]))
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
    return library


@pytest.fixture(scope="module")
def kernels():
    return load()


@pytest.fixture(autouse=True)
def default_schedule(kernels):
    kernels.use_schedule("forward")


# ---- order and timing ----


def trace(kernels, schedule, blocks=3, threads=64, seed=1):
    kernels.use_schedule(schedule, seed)
    out = np.zeros(2 * blocks * threads, np.int32)
    assert kernels.trace(blocks, threads, out.ctypes.data) == 0
    return out.reshape(blocks, 2 * threads)


# The last lane that comes to a collective goes on at once; the others wait for their next turn.
WARPS = (np.arange(32), np.arange(32, 64))


def test_forward_and_reverse(kernels):
    (a, b) = WARPS
    order = np.concatenate([a, a[-1:], b, b[-1:], a[:-1], b[:-1]])
    assert np.array_equal(trace(kernels, "forward"), [order, 1000 + order, 2000 + order])
    backward = 63 - order
    assert np.array_equal(trace(kernels, "reverse"), [2000 + backward, 1000 + backward, backward])


def test_greedy_runs_one_warp_ahead_and_lagging_keeps_the_first_back(kernels):
    (a, b) = WARPS
    order = np.concatenate([a, a[-1:], a[:-1], b, b[-1:], b[:-1]])
    assert np.array_equal(trace(kernels, "greedy")[0], order)
    assert np.array_equal(trace(kernels, "lagging")[2], 63 - order)


def test_shuffled_is_a_permutation_by_seed(kernels):
    one, again = trace(kernels, "shuffled"), trace(kernels, "shuffled")
    assert np.array_equal(one, again)
    assert not np.array_equal(one, trace(kernels, "shuffled", seed=2))
    assert sorted(one.reshape(-1)) == sorted(trace(kernels, "forward").reshape(-1))


def test_shared_memory_is_poison_for_every_block(kernels):
    for size in (0, 1, 100, 128, 100_000):
        out = np.zeros((3, size + 16), np.uint8)
        for _ in range(2):  # the first launch of all meets the static array
            assert kernels.fresh_shared(3, size, out.ctypes.data) == 0
            assert (out == 0xFF).all()


def test_copies_land_at_the_wait(kernels):
    source = guard(torch.arange(16, dtype=torch.uint8))
    seen = np.zeros((4, 2, 16), np.uint8)
    assert kernels.copy_timing(source.pointer, seen.ctypes.data) == 0
    assert (seen[0] == 5).all() and (seen[1] == 0xFF).all()
    assert np.array_equal(seen[2, 0], np.arange(16)) and (seen[2, 1] == 0xFF).all()
    assert np.array_equal(seen[3, 0], np.arange(16)) and (seen[3, 1] == 0).all()


def test_a_missing_barrier_shows_under_some_schedule(kernels):
    thread = np.arange(64)
    partner = (thread + 32) % 64
    want = partner[thread ^ 1] + 100 + partner * 1000
    wrong = {barriers: [] for barriers in (0, 1, 2, 3)}
    for barriers, names in wrong.items():
        for name in SCHEDULES:
            kernels.use_schedule(name)
            out = np.zeros(64, np.int32)
            assert kernels.exchange(barriers, out.ctypes.data) == 0
            if not np.array_equal(out, want):
                names.append(name)
    assert not wrong[3] and wrong[0] and wrong[1] and wrong[2]


def test_limits_of_the_architectures(kernels):
    hopper = load(90)
    assert (kernels.int4_mma(), hopper.int4_mma()) == (1, 0)
    assert kernels.big_shared(163 * 1024) == 0 and kernels.big_shared(163 * 1024 + 1) == 9
    assert hopper.big_shared(227 * 1024) == 0 and hopper.big_shared(227 * 1024 + 1) == 9
    assert kernels.threads_per_block(1024) == 0 and kernels.threads_per_block(1056) == 9
    assert kernels.threads_per_block(0) == 9


# ---- faults ----

SOME = torch.zeros(64, dtype=torch.uint8)
assert SOME.data_ptr() % 16 == 0
COPY = SOME.data_ptr()
BLOCK = r"block \(0, 0, 0\), thread "
FAULTS = [
    ("missing_lane", (), r"sync_warp.* has 31 of 32 lanes, one has ended in .*\(37, 0, 0\)"),
    ("partial_warp", (), r"ballot .* has 8 of 32 lanes, the warp is not full in .*\(32, 0, 0\)"),
    ("different_collectives", (), r"different collectives: (ballot|redux_max_u32) .*faults.cpp:"),
    ("lane_at_barrier", (), r"31 of 32 lanes, one waits at sync_block .*\(9, 0, 0\)"),
    ("skipped_barrier", (), r"a block barrier that some threads never reach.*\((32|63), 0, 0\)"),
    ("different_barriers", (), r"threads of a block at different barriers"),
    ("shuffle_outside", (32,), r"shuffle .* from lane 32 in .*\(5, 0, 0\)"),
    ("shuffle_outside", (-1,), r"shuffle .* from lane -1 in .*\(5, 0, 0\)"),
    ("misaligned_ldmatrix", (), r"ldmatrix_x4 .* is not 16-byte aligned in .*\(6, 0, 0\)"),
    ("ldmatrix_outside", (), r"ldmatrix_x4 .* outside shared memory in .*\(31, 0, 0\)"),
    ("misaligned_copy", (COPY,), r"cp_async_16 .* is not 16-byte aligned"),
    ("copy_outside", (COPY,), r"cp_async_16 .* outside shared memory"),
    ("unwaited_copy", (COPY,), r"cp.async that was never waited for"),
    ("misaligned_load", (COPY,), r"load_streaming_16 .* is not 16-byte aligned"),
    ("misaligned_store", (), r"store_16 .* is not 16-byte aligned"),
    ("shared_atomic", (), r"atomic_add_s32 .* shared memory where global is needed"),
    ("write_after_shared", (100,), r"a write next to shared memory"),
    ("write_after_shared", (128,), r"an access outside shared memory"),
    ("write_before_shared", (1,), r"a write next to shared memory"),
    ("write_before_shared", (4096,), r"an access outside shared memory"),
    ("write_after_static", (), r"a write next to shared memory"),
    ("read_at", (16,), r"a memory fault at 0x10 in block \(3, 1, 0\), thread \(1, 2, 0\)"),
    ("index_overflow", (1 << 15,), r"undefined behaviour .*signed overflow"),
    ("divide_by", (0,), r"an integer division by zero"),
    ("deep_recursion", (1000,), r"a memory fault"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, arguments, message", FAULTS)
def test_faults_name_block_and_thread(kernels, schedule, name, arguments, message):
    kernels.use_schedule(schedule)
    with pytest.raises(EmulatorError, match=message) as raised:
        getattr(kernels, name)(*arguments)
    assert "block (" in str(raised.value) and "thread (" in str(raised.value)
    assert kernels.exchange(3, np.zeros(64, np.int32).ctypes.data) == 0  # as if nothing had been


def test_healthy_calls_of_the_same_kernels(kernels):
    kernels.shuffle_outside(31)
    kernels.write_after_shared(99)
    kernels.read_at(COPY)
    kernels.index_overflow(1000)
    kernels.divide_by(2)
    kernels.deep_recursion(10)


def test_guarded_tensors(kernels):
    for shape, dtype in (((3, 5), torch.bfloat16), ((7,), torch.int8), ((0, 4), torch.float32)):
        original = torch.zeros(shape, dtype=dtype)
        guarded = guard(original)
        assert torch.equal(guarded.check(), original)
        assert guarded.tensor.data_ptr() % 16 == 0
    output = poisoned((2, 2), torch.float32)
    assert output.tensor.isnan().all()
    end = output.pointer + 16
    with pytest.raises(EmulatorError, match="memory fault"):
        kernels.read_at(end)
    ctypes.memset(output.pointer - 1, CANARY ^ 1, 1)
    with pytest.raises(AssertionError, match="before"):
        output.check()
