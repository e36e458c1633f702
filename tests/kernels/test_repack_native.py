"""repack_weight: the layout by its description, its inverse, and what the readers refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmqat_kernels import native
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator
from tests.kernels.test_matmul_native import OPS, codes, pack

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)

HEADER, PANEL = 64, 32


def unpack_panels(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    """The inverse of repack_weight for integer codes, from the layout's description alone."""
    quads, body = (k + 3) // 4, packed[HEADER:]
    if bits <= 4:
        panels = body.view(-1, quads, 16, 4)
        both = torch.cat([panels & 15, panels >> 4], dim=2).to(torch.int16) - 8
    else:
        both = body.view(-1, quads, PANEL, 4).to(torch.int16) - 128
    rows = both.permute(0, 2, 1, 3).reshape(-1, quads * 4)
    assert not bool(rows[n:].any()) and not bool(rows[:, k:].any()), "padding must be code 0"
    return rows[:n, :k].to(torch.int8)


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 8))
def test_repack_inverse(bits: int) -> None:
    for n in (1, 31, 32, 33, 65):
        for k in (1, 2, 3, 4, 5, 63, 64, 130):
            w = codes(n, k, bits, n * k)
            packed = OPS.repack_weight(w, bits)
            assert packed.dtype == torch.uint8 and packed.dim() == 1
            assert_same_bits(unpack_panels(packed, n, k, bits), w)
            if bits == 4:
                assert_same_bits(unpack_panels(OPS.repack_weight(pack(w), 4), n, k, 4), w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repack_float_inverse(dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (15, 3), (16, 16), (33, 7)):
        w = torch.randn(n, k, generator=generator(n)).to(dtype)
        body = OPS.repack_weight(w, 32 if dtype == torch.float32 else 16)[HEADER:]
        stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        panels = body.view(stored).view(-1, k, 16).permute(0, 2, 1).reshape(-1, k)
        assert not bool(panels[n:].any())
        assert_same_bits(panels[:n].contiguous(), w.to(stored))


def test_repack_refuses_codes_beyond_four_bits() -> None:
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.repack_weight(torch.tensor([[1, 8]], dtype=torch.int8), 4)


def test_foreign_weights_are_refused() -> None:
    packed = OPS.repack_weight(codes(32, 64, 4, 1), 4)
    a, sx, sw = codes(1, 64, 8, 2), torch.ones(1), torch.ones(32)

    def call(weight: Tensor, n: int = 32, bits: int = 4, acts: Tensor = a) -> None:
        OPS.repacked_matmul(acts, sx, weight, sw, None, n, bits, -1, torch.float32)

    call(packed)
    broken = packed.clone()
    broken[0] ^= 1
    huge = packed.clone()
    huge[8:16] = 255
    for weight in (packed[:-1].contiguous(), packed[:10].contiguous(), broken, huge, packed[:0]):
        with pytest.raises(RuntimeError, match="repack_weight"):
            call(weight)
    with pytest.raises(RuntimeError, match="bit width"):
        call(packed, bits=8)
    with pytest.raises(RuntimeError, match="n: the repacked"):
        call(packed, n=33)
    with pytest.raises(RuntimeError, match="w: repacked for K"):
        call(packed, acts=codes(1, 60, 8, 2))
    with pytest.raises(RuntimeError, match="integer codes"):
        OPS.float_matmul(torch.ones(1, 64), packed, None, 32)
