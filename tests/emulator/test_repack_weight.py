"""The CUDA kernel that lays weights out, on the CPU: the permutation of spec 25."""

import ctypes

import pytest
import torch

from llmqat_kernels.spec.int4 import pack_int4
from llmqat_kernels.testing import assert_same_bits
from tests.emulator.build import SCHEDULES, compile_kernel
from tests.emulator.linear import case, layout
from tests.emulator.memory import guard, poisoned

pytestmark = pytest.mark.emulator


@pytest.fixture(scope="module")
def kernels():
    library = compile_kernel("repack_weight")
    pointer, long, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
    inputs = [pointer, flag, long, long, flag]
    library.llmqat_cuda_repack_weight.argtypes = [*inputs, pointer, pointer, pointer]
    return library


def repack(kernels, w, nibbles, columns=None):
    """w int8 [n, k] or packed [n, ceil(columns / 2)] by the kernel: (layout, whether all fit)."""
    n, k = w.shape[0], columns or w.shape[1]
    count = layout(torch.zeros(n, k, dtype=torch.int8), nibbles).numel()
    source, out, misfit = guard(w), poisoned((count,), torch.uint8), guard(torch.zeros(1).int())
    error = kernels.llmqat_cuda_repack_weight(
        source.pointer, columns is not None, n, k, nibbles, out.pointer, misfit.pointer, None
    )
    assert error == 0
    source.check()
    return out.check(), not misfit.check().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n, k", [(1, 1), (31, 130), (34, 128), (66, 257)])
def test_repack_is_the_described_permutation(kernels, n, k, schedule):
    kernels.use_schedule(schedule)
    for bits in (4, 8):
        w = case(1, n, k, bits)[2]
        w[0, 0] = -8
        packed, fits = repack(kernels, w, bits == 4)
        assert fits
        assert_same_bits(packed, layout(w, bits == 4))
        if bits == 4:
            assert_same_bits(repack(kernels, pack_int4(w), True, columns=k)[0], packed)
    for code in (8, -9):
        w = torch.zeros(n, k, dtype=torch.int8)
        w[n - 1, k - 1] = code
        assert not repack(kernels, w, True)[1]
        assert repack(kernels, w, False)[1]
