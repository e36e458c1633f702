"""The CUDA quantize kernel on the CPU under every thread schedule, bit for bit as spec 1-4."""

import ctypes

import pytest
import torch

from llmqat_kernels.spec import quantize as spec
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.memory import guard, poisoned

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# One warp a row (with tail rows in the last block); many warps; vectors and single values; rows
# wider than what the threads hold in registers.
SHAPES = [(1, 1), (5, 7), (6, 64), (2, 1000), (2, 2048), (1, 9000)]

pytestmark = pytest.mark.emulator


@pytest.fixture(scope="module")
def kernel():
    library = compile_kernel("quantize")
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    inputs = [pointer, integer, long, long, long, integer, ctypes.c_bool]
    library.llmqat_cuda_quantize.argtypes = [*inputs, pointer, pointer, pointer]
    return library


def quantize(library, x, bits, bf16_scale):
    """Run the launcher on x[rows, columns] of dense rows, all on guarded pages; an ``x`` at an
    unaligned address stays there.
    """
    rows, columns = x.shape
    span = (rows - 1) * x.stride(0) + columns if x.numel() else 0
    source = guard(x.as_strided((span,), (1,)))
    codes, scale = poisoned(x.shape, torch.int8), poisoned((rows,), torch.float32)
    error = library.llmqat_cuda_quantize(
        x.data_ptr() if x.data_ptr() % 16 else source.pointer,
        DTYPES[x.dtype],
        rows,
        columns,
        x.stride(0),
        bits,
        bf16_scale,
        codes.pointer,
        scale.pointer,
        None,
    )
    assert error == 0
    source.check()
    return codes.check(), scale.check()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_bits_equal_spec(kernel, schedule, dtype, rows, columns):
    kernel.use_schedule(schedule)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    x[-1, columns // 2] = 40.0
    for bits, bf16_scale in ((8, False), (4, True)):
        codes, scale = quantize(kernel, x, bits, bf16_scale)
        want_codes, want_scale = spec.quantize(x, bits, -1, bf16_scale)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("place", [0, 300, 1023, 1500, 2047])
def test_the_largest_value_may_lie_anywhere(kernel, place):
    kernel.use_schedule("shuffled")
    x = torch.ones(1, 2048)
    x[0, place] = -9.0
    codes, scale = quantize(kernel, x, 8, False)
    assert scale.item() == torch.tensor(9.0).div(torch.tensor(127.0)).item()
    assert codes[0, place] == -127


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(kernel, dtype):
    kernel.use_schedule("shuffled")
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0.0
    x[1, 95] = float("nan")
    x[2, 0] = -float("inf")
    x[3] = (torch.arange(96) - 48.5) / 8  # ties at 8 bits once the largest is 127 / 8
    x[3, 0] = 127 / 8
    x[4] *= 1e-6 if dtype == torch.float16 else 1e-39
    x[5] = torch.finfo(dtype).max
    codes, scale = quantize(kernel, x, 8, False)
    want_codes, want_scale = spec.quantize(x, 8)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale.isnan(), want_scale.isnan())
    assert torch.equal(scale.nan_to_num(), want_scale.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, stride", [(64, 96), (64, 67), (7, 9), (1000, 2048)])
def test_rows_apart_give_the_same_bits(kernel, dtype, columns, stride):
    """Vectors where the stride allows them, else single values."""
    kernel.use_schedule("shuffled")
    random = torch.Generator().manual_seed(stride)
    x = torch.full((5, stride), float("nan"), dtype=dtype)[:, :columns]
    x.copy_(torch.randn(5, columns, generator=random).to(dtype))
    want = spec.quantize(x.contiguous(), 8)
    for got in (quantize(kernel, x, 8, False), quantize(kernel, x.contiguous(), 8, False)):
        assert all(map(torch.equal, got, want))


def test_unaligned_input_and_empty(kernel):
    kernel.use_schedule("forward")
    base = torch.randn(1 + 4 * 64, generator=torch.Generator().manual_seed(3))
    x = base[1:].view(4, 64)
    assert x.data_ptr() % 16 != 0
    codes, scale = quantize(kernel, x, 8, False)
    want_codes, want_scale = spec.quantize(x, 8)
    assert torch.equal(codes, want_codes) and torch.equal(scale, want_scale)
    quantize(kernel, torch.empty(0, 64), 8, False)
    _, scale = quantize(kernel, torch.empty(3, 0), 8, False)
    assert scale.tolist() == [1.0, 1.0, 1.0]
