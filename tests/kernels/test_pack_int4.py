"""pack_int4, unpack_int4: spec 8."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.testing import assert_same_bits


def test_hand_written_bytes(backend):
    packed = qk.pack_int4(torch.tensor([[1, -1, 7, -7, 3]], dtype=torch.int8))
    assert packed.tolist() == [[0xF1, 0x97, 0x03]]


def test_every_byte_in_every_lane(backend):
    for lanes in (1, 4, 8, 16, 33):
        packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(lanes).reshape(-1, lanes)
        codes = qk.unpack_int4(packed)
        low, high = packed.to(torch.int16) & 15, packed.to(torch.int16) >> 4
        want = torch.stack((low, high), -1).flatten(-2)
        assert_same_bits(codes.to(torch.int16), torch.where(want > 7, want - 16, want))
        assert_same_bits(qk.pack_int4(codes), packed)


@pytest.mark.parametrize("columns", [0, 1, 2, 3, 31, 32, 33, 577])
def test_round_trip(backend, columns):
    codes = (torch.arange(5 * columns).reshape(5, columns) % 15 - 7).to(torch.int8)
    packed = qk.pack_int4(codes)
    assert packed.shape == (5, (columns + 1) // 2)
    assert_same_bits(qk.unpack_int4(packed, columns), codes)
    if columns % 2:
        assert (packed[:, -1] >> 4 == 0).all()


def test_strided_input(backend):
    codes = (torch.arange(64).reshape(8, 8) % 15 - 7).to(torch.int8)
    assert_same_bits(qk.pack_int4(codes.t()), qk.pack_int4(codes.t().contiguous()))


def test_values_outside_wrap_to_their_low_four_bits(backend):
    codes = torch.arange(-128, 128).to(torch.int8).reshape(16, 16)
    low = (codes.to(torch.int16) + 8) % 16 - 8
    assert_same_bits(qk.unpack_int4(qk.pack_int4(codes)), low.to(torch.int8))


def test_bad_arguments(backend):
    packed = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(qk.InvalidArgument, match="columns"):
        qk.unpack_int4(packed, 5)
    with pytest.raises(qk.InvalidArgumentType, match="packed"):
        qk.unpack_int4(packed.to(torch.int8))
    with pytest.raises(qk.InvalidArgumentType, match="codes"):
        qk.pack_int4(packed)
