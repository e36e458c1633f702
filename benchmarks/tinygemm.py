"""torch's own weight-only int4 GEMM (tinygemm) on this package's codes: a baseline.

It stores codes + 8 without sign in a layout of its own, and a scale and a zero point in bf16 for
every group of columns, so a scale a channel is repeated over the groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROUPS = (128, 64, 32)
INNER_TILES = 8
"""Tiles of K that one thread's load holds: the widest that the operator takes."""
aten = torch.ops.aten


def group_of(columns: int) -> int:
    """The largest group size that the operator takes and that divides K.

    Raises:
        ValueError: there is none.
    """
    for group in GROUPS:
        if columns % group == 0:
            return group
    raise ValueError(f"no group size of {GROUPS} divides K = {columns}")


def pack(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weight in the operator's layout, and scale and zero point bf16 [K / group, N, 2].

    Args:
        codes: int8 [N, K] in -8..7. scale: fp32 [N].
    """
    unsigned = codes.int() + 8
    if codes.is_cuda:
        pairs = (unsigned[:, 0::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
        packed = aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    else:
        packed = aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    grid = torch.stack((scale, torch.zeros_like(scale)), -1).to(torch.bfloat16)
    groups = codes.shape[1] // group_of(codes.shape[1])
    return packed, grid.expand(groups, *grid.shape).contiguous()


def linear(packed: Tensor, grid: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
    """x bf16 [M, K] -> bf16 [M, N]."""
    group = group_of(columns)
    product = aten._weight_int4pack_mm if packed.is_cuda else aten._weight_int4pack_mm_for_cpu
    return lambda x: product(x, packed, group, grid)
