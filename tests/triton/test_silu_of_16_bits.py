"""SiLU with FMAs and an approximate inverse: every gate that fp16 and bf16 have, bit for bit.

There are 65,536 of each, so this is a proof and no sample: of the fused operations, and of
any inverse that is up to 4 ulp off (rcp.approx.ftz is within 1). With `make test-gpu` the first
test shows the same of the device's own inverse.
"""

import pytest
import torch
import triton
import triton.language as tl

from llmqat_kernels.backends import triton as backend
from llmqat_kernels.backends.triton import numerics
from llmqat_kernels.spec import activation as spec
from llmqat_kernels.testing import assert_same_bits

from .device import DEVICE, run

BLOCK = 4096
OFF = tl.constexpr(0)
"""Ulps that :func:`inverse_off` is off; a test sets it."""


@triton.jit
def silu_kernel(gate, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at).to(tl.float32)
    tl.store(y + at, numerics.silu_of_16_bits(g).to(y.dtype.element_ty))


exact_inverse = numerics.near_inverse


@triton.jit
def inverse_off(x):
    inverse = exact_inverse(x)
    moved = (inverse.to(tl.int32, bitcast=True) + OFF).to(tl.float32, bitcast=True)
    return tl.where(inverse > 0, moved, inverse)


def every_gate(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_gate(dtype):
    gate = every_gate(dtype)
    up = torch.ones_like(gate)
    assert_same_bits(run("silu_mul", gate, up), spec.silu_mul(gate, up))


@pytest.mark.parametrize("off", [-4, -1, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_gate_notices_an_inverse_that_is_off(dtype, off, monkeypatch):
    if not backend.interpreting():
        pytest.skip("the inverse can be replaced in the interpreter only")
    monkeypatch.setattr(numerics, "near_inverse", inverse_off)
    monkeypatch.setitem(globals(), "OFF", tl.constexpr(off))
    gate = every_gate(dtype)
    gate = gate[gate != float("inf")]
    gate = torch.cat((gate, gate[:1]))
    y = torch.empty_like(gate, device=DEVICE)
    silu_kernel[(len(gate) // BLOCK,)](gate.to(DEVICE), y, BLOCK=BLOCK, enable_fp_fusion=False)
    assert_same_bits(y.cpu(), spec.silu_mul(gate, torch.ones_like(gate)))


def test_an_inverse_far_off_is_noticed(monkeypatch):
    with pytest.raises(AssertionError):
        test_no_gate_notices_an_inverse_that_is_off(torch.bfloat16, 1 << 14, monkeypatch)
