"""The repairs of Triton's interpreter (backends/triton/interpreter.py), against torch, bit for bit.

The bf16 tests of what a repair touches and the loop fail without it on a supported release of
triton; the others show that nothing else changes. With `make test-gpu` the same bodies
show that compiled kernels compute what the repaired interpreter does.
"""

import math
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl

from llmqat_kernels.backends import triton as backend
from llmqat_kernels.testing import assert_same_bits

from .device import DEVICE

if backend.interpreting():
    from llmqat_kernels.backends.triton import interpreter

    interpreter.repair()  # the first use of an operator does so too

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZE = 256


@triton.jit
def cast_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def binary_kernel(x, y, z, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "where":
        c = tl.where(a < b, a, b)
    elif OP == "neg":
        c = -a
    elif OP == "abs":
        c = tl.abs(a)
    tl.store(z + at, c)


@triton.jit
def compare_kernel(x, y, z, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(z + at, (tl.load(x + at) < tl.load(y + at)).to(tl.int8))


@triton.jit
def scalar_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at) * 0.5 + 1.0)


@triton.jit
def fma_kernel(x, y, z, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(z + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


@triton.jit
def memory_kernel(x, y, z, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    loaded = tl.load(x + at, mask=at < count, other=1.5)
    tl.store(y + at, loaded)
    tl.store(z + at, loaded.to(tl.float32) * 3.0)  # rounds to the element of z
    tl.store(z + at, tl.full((SIZE,), -2.5, z.dtype.element_ty), mask=at >= count)


@triton.jit
def scan_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.cumsum(tl.load(x + at).to(tl.float32), axis=0))


@triton.jit
def reduce_kernel(x, y, OP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SIZE)
    values = tl.load(x + rows[:, None] * SIZE + columns[None, :])
    if OP == "sum":
        result = tl.sum(values, axis=1)
    elif OP == "max":
        result = tl.max(values, axis=1)
    else:
        result = tl.min(values, axis=1)
    tl.store(y + rows, result)


@triton.jit
def argmax_kernel(x, y, at_y, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SIZE)
    values = tl.load(x + rows[:, None] * SIZE + columns[None, :])
    best, where = tl.max(values, axis=1, return_indices=True)
    tl.store(y + rows, best)
    tl.store(at_y + rows, where)


@triton.jit
def dot_kernel(x, y, z, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    tl.store(z + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


@triton.jit
def loop_kernel(x, y, steps, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(0, steps):
        total += tl.load(x + step * SIZE + at)
    tl.store(y + at, total)


@triton.jit
def bits_kernel(x, y, z, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    v = tl.load(x + at)
    tl.store(y + at, v.to(tl.int16, bitcast=True))
    tl.store(z + at, v.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True))


def launch(kernel, *args, **constants):
    """Results of the tensors of ``args`` are on the CPU afterwards."""
    placed = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    kernel[(1,)](*placed, **constants, enable_fp_fusion=False)
    for given, used in zip(args, placed, strict=True):
        if isinstance(given, torch.Tensor):
            given.copy_(used)


def numbers(dtype, seed=0, size=SIZE):
    """Normal numbers of every magnitude, ties of bf16 rounding among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    x *= torch.exp2(torch.randint(-8, 9, (size,), generator=generator).float())
    bits = x.view(torch.int32)
    bits[::4] = bits[::4] & -65536 | 0x8000  # halfway between two bf16
    return x.to(dtype)


SPECIAL = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-40, 3.4e38, 65504.0, 1.0])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", [*DTYPES, torch.int8, torch.int32, torch.int64])
def test_casts(source, target):
    x = numbers(torch.float32) if source.is_floating_point else torch.arange(SIZE) * 513 - 2**16
    if source == torch.int8:
        x = x.clamp(-128, 127)
    x = x.to(source)
    if source == torch.float32 and target == torch.bfloat16:
        x[: len(SPECIAL)] = SPECIAL
    y = torch.empty(SIZE, dtype=target)
    launch(cast_kernel, x, y, SIZE=SIZE)
    # A compiled kernel goes through fp32, which holds these integers exactly; so does torch.
    assert_same_bits(y, x.to(target))


@pytest.mark.parametrize("target", [torch.int8, torch.int32])
def test_casts_of_bf16_to_integers(target):
    x = (torch.arange(SIZE) - 128).to(torch.bfloat16)
    y = torch.empty(SIZE, dtype=target)
    launch(cast_kernel, x, y, SIZE=SIZE)
    assert_same_bits(y, x.to(target))


def test_nan_stays_nan():
    x = torch.full((SIZE,), float("nan"))
    x[1].view(torch.int32).fill_(0x7F800001)  # its payload lies in the bits that bf16 drops
    for target in (torch.bfloat16, torch.float16):
        y = torch.zeros(SIZE, dtype=target)
        launch(cast_kernel, x, y, SIZE=SIZE)
        assert y.isnan().all()


def nearest(value):
    """The fp32 number nearest to a fraction; of two, the even one."""
    at = torch.tensor(float(value), dtype=torch.float32)
    near = [at, *(torch.nextafter(at, torch.tensor(to)) for to in (-math.inf, math.inf))]
    return min(
        near, key=lambda x: (abs(Fraction(x.item()) - value), x.view(torch.int32).item() & 1)
    )


def test_fma_rounds_once():
    x, y, z = (numbers(torch.float32, seed) for seed in range(3))
    z[::2] = -(x * y)[::2]  # what is left is the product's rounding error
    # A little less, and a little more, than halfway between two numbers: fp64 alone sees a tie.
    x[1], y[1], z[1] = 2**-24 * (1 + 2**-23), 1 - 2**-23, 1 + 2**-23
    x[3], y[3], z[3] = -(2**-24) * (1 + 2**-23), 1 - 2**-23, -1 - 2**-23
    x[5], y[5], z[5] = 2**-24 * (1 + 2**-23), 1 + 2**-23, 1.0
    x[7], y[7], z[7] = 2**-100 * (1 + 2**-23), 2**-50 * (1 - 2**-23), 2**-149
    want = [
        nearest(Fraction(a) * Fraction(b) + Fraction(c))
        for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    launch(fma_kernel, x, y, z, SIZE=SIZE)
    assert_same_bits(z, torch.stack(want))


EXPECTED = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": torch.minimum,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
}


@pytest.mark.parametrize("op", EXPECTED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(op, dtype):
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    c = torch.empty(SIZE, dtype=dtype)
    launch(binary_kernel, a, b, c, OP=op, SIZE=SIZE)
    assert_same_bits(c, EXPECTED[op](a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparisons(dtype):
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    c = torch.empty(SIZE, dtype=torch.int8)
    launch(compare_kernel, a, b, c, SIZE=SIZE)
    assert_same_bits(c, (a < b).to(torch.int8))


def test_scalars():
    x = numbers(torch.bfloat16)
    y = torch.empty_like(x)
    launch(scalar_kernel, x, y, SIZE=SIZE)
    assert_same_bits(y, x * 0.5 + 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_loads_constants_and_stores(dtype):
    x = numbers(dtype)
    y, z = torch.empty_like(x), torch.empty_like(x)
    launch(memory_kernel, x, y, z, 100, SIZE=SIZE)
    assert_same_bits(y[:100], x[:100])
    assert_same_bits(z[:100], (x[:100].float() * 3.0).to(dtype))
    assert_same_bits(y[100:], torch.full((SIZE - 100,), 1.5, dtype=dtype))
    assert_same_bits(z[100:], torch.full((SIZE - 100,), -2.5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scans(dtype):
    x = torch.arange(SIZE).remainder(5).sub(2).to(dtype)
    y = torch.empty(SIZE)
    launch(scan_kernel, x, y, SIZE=SIZE)
    assert_same_bits(y, x.float().cumsum(0))


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(op, dtype):
    x = numbers(dtype).reshape(4, -1)
    if op == "sum":  # integers, so that the order of the sum does not matter
        x = torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.empty(4, dtype=dtype)
    launch(reduce_kernel, x, y, OP=op, ROWS=4, SIZE=x.shape[1])
    assert_same_bits(y, {"sum": x.sum, "max": x.amax, "min": x.amin}[op](1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax(dtype):
    x = torch.arange(SIZE).sub(100).roll(17).to(dtype).reshape(4, -1)
    best, where = torch.empty(4, dtype=dtype), torch.empty(4, dtype=torch.int32)
    launch(argmax_kernel, x, best, where, ROWS=4, SIZE=x.shape[1])
    assert_same_bits(best, x.amax(1))
    assert_same_bits(where, x.argmax(1).int())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, s, generator=generator) for s in ((16, 32), (32, 16)))
    c = torch.empty(16, 16)
    launch(dot_kernel, a.to(dtype), b.to(dtype), c, M=16, N=16, K=32)
    assert_same_bits(c, (a @ b).float())


def test_int8_dot():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-128, 128, s, generator=generator, dtype=torch.int8)
        for s in ((16, 64), (64, 16))
    )
    c = torch.empty(16, 16, dtype=torch.int32)
    launch(dot_kernel, a, b, c, M=16, N=16, K=64)
    assert_same_bits(c, a.int() @ b.int())


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_loops_to_a_run_time_bound(steps):
    x = numbers(torch.float32, size=max(steps, 1) * 32).reshape(-1, 32)
    y = torch.empty(32)
    launch(loop_kernel, x, y, steps, SIZE=32)
    expected = torch.zeros(32)
    for row in x[:steps]:
        expected = expected + row
    assert_same_bits(y, expected)


def test_bit_casts_keep_the_bits():
    x = numbers(torch.bfloat16)
    bits, back = torch.empty(SIZE, dtype=torch.int16), torch.empty_like(x)
    launch(bits_kernel, x, bits, back, SIZE=SIZE)
    assert_same_bits(bits, x.view(torch.int16))
    assert_same_bits(back, x)


def test_repairs_are_applied_once():
    if not backend.interpreting():
        pytest.skip("TRITON_INTERPRET=0: nothing is repaired")
    before = interpreter.Builder.binary_op
    interpreter.repair()
    assert interpreter.Builder.binary_op is before
