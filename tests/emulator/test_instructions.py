"""Each wrapper of arch.cuh against numpy, written from the PTX manual and not from the emulator."""

import ctypes
import itertools
import shutil
import subprocess
from fractions import Fraction
from functools import partial
from math import floor, inf, isfinite, log2, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.emulator.build import FAST, ROOT, SCHEDULES, Kernels, compile_library

SOURCE = ROOT / "tests/emulator/instructions.cu"
LANES = np.arange(32)


def call(library, name, words, device="cpu"):
    """One probe: in[32, 16] to out[32, 8], words, a row a lane."""
    given = torch.from_numpy(np.ascontiguousarray(words, np.uint32).view(np.int32)).to(device)
    result = torch.zeros(32, 8, dtype=torch.int32, device=device)
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert function(given.data_ptr(), result.data_ptr()) == 0
    return result.cpu().numpy().view(np.uint32)


@pytest.fixture(scope="module")
def emulated():
    return Kernels(compile_library(SOURCE, FAST))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The same kernels by nvcc, for the device that is there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    major, minor = torch.cuda.get_device_capability()
    output = tmp_path_factory.mktemp("device") / "instructions.so"
    flags = f"-std=c++20 -shared -Xcompiler -fPIC -arch=sm_{major}{minor} -Icsrc -Icsrc/include"
    flags += " -DLLMQAT_NO_INT4_PROBE" if major >= 9 else ""
    subprocess.run(["nvcc", *flags.split(), SOURCE, "-o", output], cwd=ROOT, check=True)
    return ctypes.CDLL(str(output))


KINDS = [
    pytest.param("emulated", marks=pytest.mark.emulator),
    pytest.param("compiled", marks=pytest.mark.gpu),
]


@pytest.fixture(params=KINDS)
def run(request):
    """``run(name, in[32, 16]) -> out[32, 8]`` in the emulator or on a device."""
    library = request.getfixturevalue(request.param)
    device = "cpu" if request.param == "emulated" else "cuda"
    return SimpleNamespace(
        library=library, probe=lambda name, given: call(library, name, given, device)
    )


def words(seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (32, 16), dtype=np.uint32)


# ---- tensor cores ----


def fragments(matrix, registers, row, column):
    """The 32-bit registers of all lanes of ``matrix[rows, columns]``, element 0 low.

    ``row(lane, r, i)`` and ``column(lane, r, i)``: where element i of register r lies.
    """
    bits = {np.dtype(np.int8): 8, np.dtype(np.uint16): 16}.get(matrix.dtype, 4)
    out = np.zeros((32, registers), np.uint64)
    for lane in range(32):
        for r in range(registers):
            for i in range(32 // bits):
                value = int(matrix[row(lane, r, i), column(lane, r, i)]) & ((1 << bits) - 1)
                out[lane, r] |= np.uint64(value << (bits * i))
    return out.astype(np.uint32)


def a_and_b(a, b, n):
    """Fragments of a[16, 8n] and b[8n, 8], n values a register (PTX: a0-a3 by row, then by k)."""
    fa = fragments(
        a,
        4,
        lambda lane, r, i: lane // 4 + (8 if r in (1, 3) else 0),
        lambda lane, r, i: lane % 4 * n + i + (4 * n if r >= 2 else 0),
    )
    fb = fragments(
        b,
        2,
        lambda lane, r, i: lane % 4 * n + i + (4 * n if r == 1 else 0),
        lambda lane, r, i: lane // 4,
    )
    return fa, fb


def accumulator(lane, r):
    return lane // 4 + (8 if r >= 2 else 0), lane % 4 * 2 + r % 2


def mma_words(fa, fb, acc):
    given = np.zeros((32, 16), np.uint32)
    given[:, :4], given[:, 4:6] = fa, fb
    for lane in range(32):
        for r in range(4):
            given[lane, 6 + r] = acc[accumulator(lane, r)]
    return given


def matrix_of(out):
    d = np.zeros((16, 8), np.uint32)
    for lane in range(32):
        for r in range(4):
            d[accumulator(lane, r)] = out[lane, r]
    return d


@pytest.mark.parametrize("name, bits", [("m16n8k32_s8", 8), ("m16n8k64_s4", 4)])
def test_integer_mma(run, name, bits):
    if not hasattr(run.library, name):
        pytest.skip(f"{name} is for sm_80 to sm_89")
    k, low = 256 // bits, -(1 << (bits - 1))
    kind = np.int8 if bits == 8 else np.int64  # int64: a nibble
    random = np.random.default_rng(bits)
    a = random.integers(low, -low, (16, k)).astype(kind)
    b = random.integers(low, -low, (k, 8)).astype(kind)
    a[3], b[:, 5] = low, low  # the largest product
    acc = random.integers(-(2**31), 2**31, (16, 8))
    acc[3, 5] = 2**31 - 1  # wraps
    want = (a.astype(np.int64) @ b.astype(np.int64) + acc) & 0xFFFFFFFF
    given = mma_words(*a_and_b(a, b, 32 // bits), acc.astype(np.uint32))
    assert np.array_equal(matrix_of(run.probe(name, given)), want)


def encode(values, kind):
    """fp32 values to the bits of fp16 or bf16 and back."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    rounded = torch.from_numpy(values).to(dtype)
    return rounded.view(torch.int16).numpy().view(np.uint16), rounded.double().numpy()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_mma(run, kind):
    random = np.random.default_rng(1)
    a_bits, a = encode(random.standard_normal((16, 16)).astype(np.float32), kind)
    b_bits, b = encode(random.standard_normal((16, 8)).astype(np.float32), kind)
    acc = random.standard_normal((16, 8)).astype(np.float32)
    given = mma_words(*a_and_b(a_bits, b_bits, 2), acc.view(np.uint32))
    out = matrix_of(run.probe(f"m16n8k16_{kind}", given)).view(np.float32)
    bound = (np.abs(a) @ np.abs(b) + np.abs(acc)) * 2.0**-20
    assert (np.abs(out - (a @ b + acc)) <= bound).all()


@pytest.mark.parametrize("name, count", [("x4", 4), ("x2", 2), ("x4_trans", 4)])
def test_ldmatrix(run, name, count):
    given = words(2)
    rows = np.random.default_rng(3).permutation(32 * 4)[:32] * 16  # any 16-byte row of the 2 KiB
    given[:, 0] = rows
    if count == 2:
        given[16:, 0] = 0  # addresses that nobody reads
    shared = given.view(np.uint16).reshape(-1)
    out = run.probe(f"probe_ldmatrix_{name}", given)[:, :count]
    for m in range(count):
        matrix = np.stack([shared[r // 2 : r // 2 + 8] for r in rows[8 * m : 8 * m + 8]])
        matrix = matrix.T if name.endswith("trans") else matrix
        pairs = np.ascontiguousarray(matrix).view(np.uint32)  # [8 rows, 4 pairs]
        assert np.array_equal(out[:, m], pairs[LANES // 4, LANES % 4])


# ---- memory ----


def test_cp_async(run):
    given = words(4)
    out = run.probe("probe_cp_async", given)
    first = np.where(LANES[:, None] % 2 == 0, given[:, :4], 0)
    assert np.array_equal(out[:, :4], first[(LANES + 1) % 32])
    assert np.array_equal(out[:, 4:], given[LANES ^ 1, 4:8])


def test_loads(run):
    given = words(5)
    out = run.probe("probe_load", given)
    assert np.array_equal(out[:, :4], given[LANES ^ 3, :4])
    assert np.array_equal(out[:, 4:], given[:, 8:12])


def test_atomics(run):
    given = words(6)
    out = run.probe("probe_atomics", given)
    total, top = given[:, 0].sum(dtype=np.uint32), given[:, 1].max()
    assert (out[:, 0] == total).all() and (out[:, 1] == total).all()
    assert (out[:, 2] == 32).all() and (out[:, 3] == top).all()
    order = np.argsort(out[:, 5])
    assert np.array_equal(out[order, 5], LANES)  # each ticket once
    assert ((out[:, 6] == 0) | np.isin(out[:, 6], given[:, 1])).all()
    assert len(np.unique(out[:, 4])) == 32  # partial sums


# ---- warps and words ----


def test_warp_functions(run):
    given = words(7)
    given[:, 1] = np.random.default_rng(8).integers(0, 32, 32)
    given[:, 0] &= 0x7F7FFFFF  # not a NaN, whose bits a float shuffle may change
    out = run.probe("probe_shuffle", given)
    value = given[:, 0]
    down = np.where(LANES + 3 < 32, LANES + 3, LANES)
    votes = sum(1 << lane for lane in range(32) if given[lane, 2] & 1)
    assert np.array_equal(out[:, 0], value[given[:, 1]])
    assert np.array_equal(out[:, 1], value[LANES ^ 5])
    assert np.array_equal(out[:, 2], value[down])
    assert np.array_equal(out[:, 3], value[31 - LANES])
    assert np.array_equal(out[:, 4], value[LANES ^ 16])
    assert (out[:, 5] == votes).all()
    assert (out[:, 6] == given[:, 3].max()).all()
    assert (out[:, 7] == given[:, 4].sum(dtype=np.uint32)).all()


def permute(a, b, selector):
    source, out = a.to_bytes(4, "little") + b.to_bytes(4, "little"), []
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source[nibble & 7]
        out.append((0xFF if byte >= 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def test_words(run):
    given = words(9)
    given[:, 3] = np.linspace(-140, 100, 32).astype(np.float32).view(np.uint32)
    out = run.probe("probe_words", given)
    for lane in range(32):
        a, b, c = (int(v) for v in given[lane, :3])
        assert out[lane, 0] == permute(a, b, c)
        assert out[lane, 1] == (a & b) | c
        assert out[lane, 2] == (b ^ (a & c))
        pairs = zip(*(np.array([v], np.uint32).view(np.int8).tolist() for v in (a, b)), strict=True)
        assert out[lane, 3] == (sum(x * y for x, y in pairs) + c) & 0xFFFFFFFF
    exact = np.exp2(given[:, 3].view(np.float32).astype(np.float64))
    got = out[:, 4].view(np.float32)
    assert (np.abs(got - exact) <= np.maximum(np.abs(exact) * 2.0**-22, 2.0**-149)).all()


def value_of(bits, mantissa, bias):
    """The value of a 16-bit float as a Fraction, or inf or nan."""
    sign = -1 if bits >> 15 else 1
    exponent, fraction = (bits & 0x7FFF) >> mantissa, bits & ((1 << mantissa) - 1)
    if exponent == (1 << (15 - mantissa)) - 1:
        return nan if fraction else sign * inf
    top = (1 << mantissa) if exponent else 0
    return sign * Fraction(top + fraction) * Fraction(2) ** (max(exponent, 1) - bias - mantissa)


def bits_of(value, mantissa, bias):
    """The nearest 16-bit float of a Fraction, half to even, without its sign if it is 0."""
    if value == 0:
        return 0
    sign, value = (0x8000, -value) if value < 0 else (0, value)
    exponent = floor(log2(value.numerator) - log2(value.denominator))
    exponent += 1 if value >= Fraction(2) ** (exponent + 1) else 0
    exponent = max(exponent - (1 if value < Fraction(2) ** exponent else 0), 1 - bias)
    code = round(value / Fraction(2) ** (exponent - mantissa))  # a Fraction rounds half to even
    return sign | min(code + ((exponent + bias - 1) << mantissa), (2 * bias + 1) << mantissa)


# Result column: the operation on words first, first + 1 ... of the input, and the format.
HALVES = [
    (0, 0, 3, (10, 15), lambda a, b, c: a * b + c),
    (1, 0, 2, (10, 15), lambda a, b: a * b),
    (2, 0, 2, (10, 15), lambda a, b: a + b),
    (3, 0, 2, (10, 15), lambda a, b: a - b),
    (4, 3, 3, (7, 127), lambda a, b, c: a * b + c),
    (5, 3, 2, (7, 127), lambda a, b: a * b),
]


def test_packed_halves(run):
    given = words(11)
    # fp16 near 1, where ties are; denormals; bf16 sums that a term far below decides.
    given[:16, :3] = (given[:16, :3] & 0x83FF83FF) | 0x3C003C00
    given[16, :3] = 0x00010001, 0x3C003800, 0x00010002
    given[17, 3:6] = 0x3F883F88, 0x3F883F88, 0x80010001  # a tie, +- the smallest
    given[18, 3:6] = 0x3F883F88, 0x3F883F88, 0xA0002000
    given[19:24, 3:6] = (given[19:24, 3:6] & 0x80FF80FF) | 0x3F003F00
    out = run.probe("probe_half2", given)
    checked = 0
    for lane, (column, first, count, form, operation) in itertools.product(range(32), HALVES):
        for shift in (0, 16):
            bits = [int(w) >> shift & 0xFFFF for w in given[lane, first : first + count]]
            values = [value_of(v, *form) for v in bits]
            if not all(isfinite(v) for v in values):
                continue
            got = int(out[lane, column]) >> shift & 0xFFFF
            want = bits_of(operation(*values), *form)
            assert got == want or (want == 0 and got == 0x8000), (lane, column, bits)
            checked += 1
    assert checked > 300


def test_signed_zeros_and_infinities(run):
    given = np.zeros((32, 16), np.uint32)
    given[0, :3] = 0x80008000, 0x00008000, 0x80000000  # -0 and +0
    given[1, :2] = 0x7C00FC00, 0x7C007C00  # infinities of fp16
    given[2, 3:6] = 0x80008000, 0x00008000, 0
    out = run.probe("probe_half2", given)
    assert out[0, :4].tolist() == [0x80000000, 0x80000000, 0x00008000, 0x80000000]
    assert out[1, 2:4].tolist() == [0x7C007FFF, 0x7FFFFC00]
    assert out[2, 5] == 0x80000000


@pytest.mark.emulator
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_collectives_under_every_schedule(emulated, schedule):
    emulated.use_schedule(schedule)
    run = SimpleNamespace(library=emulated, probe=partial(call, emulated))
    test_cp_async(run)
    test_warp_functions(run)
    test_ldmatrix(run, "x4_trans", 4)
    emulated.use_schedule("forward")
