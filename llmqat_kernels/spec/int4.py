"""int4 packing: spec 8."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes [..., C] -> uint8 [..., ceil(C / 2)]: low nibble = even column, two's
    complement.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """uint8 [..., ceil(columns / 2)] -> int8 codes [..., columns]."""
    low, high = packed & 0xF, packed >> 4
    nibbles = torch.stack((low, high), dim=-1).flatten(-2)[..., :columns].to(torch.int8)
    return torch.where(nibbles >= 8, nibbles - 16, nibbles)
