"""Tiles of the integer matmul kernels: pure functions, tested on the CPU.

``n`` counts rows of the stored weight: in the repacked 4-bit layout one row of bytes holds two
channels. Why these tiles: docs/experiments.md. What limits them, a multiprocessor each:

* sm_80: warps are placed along the rows of a repacked weight, so ``n >= m`` unpacks a byte once.
* sm_90: the compiler waits for int8 wgmma at the end of every step (it pipelines only fp32
  accumulators), so a step must be long, or two programs must share a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

GROUP = 8
"""Token tiles that walk the weight together (gemm.tile_of)."""
MULTIPROCESSORS = {80: 108, 90: 132}
"""Of the A100 and the H100: fewer programs than this leave some of them idle."""


@dataclass(frozen=True)
class Tile:
    """``m`` tokens x ``n`` stored weight rows, ``k`` columns a step."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


CODES = {
    80: (
        Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 64, 128, 4, 3),
        Tile(64, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
    90: (
        Tile(256, 128, 128, 8, 3),
        Tile(128, 128, 128, 4, 3),
        Tile(128, 64, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
}
"""Architecture -> tiles of int8 and plainly packed codes, largest first."""

PAIRS = {
    80: (
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 128, 8, 3),
        Tile(64, 64, 128, 4, 3),
        Tile(32, 64, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
    90: (
        Tile(128, 128, 128, 8, 3),
        Tile(128, 64, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
}
"""Architecture -> tiles of the repacked 4-bit layout, which keeps two accumulators."""

GROUPS = (
    Tile(128, 128, 128, 8, 3),
    Tile(64, 64, 128, 4, 3),
    Tile(16, 64, 128, 4, 3),
)
"""Tiles of weights in groups: a second accumulator holds the group's sum."""

GROUP_PAIRS = (
    Tile(128, 64, 128, 8, 3),
    Tile(64, 64, 128, 8, 3),
    Tile(16, 64, 128, 4, 3),
)
"""Tiles of repacked 4-bit weights in groups: four accumulators."""

BACKWARD = {
    80: (
        Tile(256, 128, 32, 8, 3),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
    ),
    90: (
        Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
    ),
}
"""Architecture -> tiles of the gradients in fp16 and bf16: m rows of dY x n columns of codes; tall,
so that a code is converted once for many rows."""
BACKWARD_GATHERED = {80: Tile(128, 128, 32, 8, 3), 90: Tile(128, 128, 64, 8, 3)}
"""Of groups that a tile's columns do not fill: each code's scale is looked up, which takes
registers that neither the largest tile nor four warps have."""
BACKWARD_FP32 = (Tile(64, 64, 16, 4, 2),)
"""Of gradients in fp32, which no tensor core multiplies."""
BACKWARD_IRREGULAR = Tile(64, 64, 32, 4, 2)
BACKWARD_IRREGULAR_FP32 = Tile(32, 32, 16, 4, 2)
"""For rows that begin anywhere: they are loaded element by element, which takes registers."""


def choose(tiles: Sequence[Tile], m: int, n: int, arch: int) -> Tile:
    """The largest tile that gives every multiprocessor a program; else the one with most programs.

    A tile of more tokens than there are only serves more than half empty products, and is left out.
    """
    smallest = min(tile.m for tile in tiles)
    fitting = [tile for tile in tiles if tile.m <= max(smallest, 2 * m - 1)]

    def programs(tile: Tile) -> int:
        return -(-m // tile.m) * -(-n // tile.n)

    for tile in fitting:
        if programs(tile) >= MULTIPROCESSORS[arch]:
            return tile
    most = max(map(programs, fitting))
    return next(tile for tile in fitting if programs(tile) == most)


def code_tile(m: int, n: int, arch: int) -> Tile:
    """Tile for m tokens and n channels of int8 or plainly packed codes."""
    return choose(CODES[arch], m, n, arch)


def irregular_tile(tiles: Sequence[Tile]) -> Tile:
    """The tile for rows that begin anywhere: they are loaded and stored element by element, and
    only the smallest tile, in short steps, fits the registers then.
    """
    return replace(tiles[-1], k=64)


def pair_tile(m: int, half: int, arch: int) -> Tile:
    """Tile for m tokens and ``half`` rows of channel pairs."""
    return choose(PAIRS[arch], m, half, arch)


def group_steps(group_size: int, regular: bool = True) -> tuple[int, int, bool]:
    """``(k, steps, whole)``: a group is ``steps`` steps of k columns; ``whole`` if they fill it.

    k is 32 to 128, a power of two: the int8 products of both architectures take 32 columns. Groups
    other than 32, 64 and multiples of 128, and all in rows that begin anywhere (not ``regular``),
    are padded with zeros; their steps are short, as those of `irregular_tile`.
    """
    if regular and (group_size in (32, 64) or group_size % 128 == 0):
        k = min(128, group_size)
        return k, group_size // k, True
    k = 32 if group_size <= 32 else 64
    return k, -(-group_size // k), False


def group_tile(
    tiles: Sequence[Tile], m: int, n: int, arch: int, group_size: int, regular: bool
) -> Tile:
    """Tile for weights in groups: steps never cross a group."""
    k, _, whole = group_steps(group_size, regular)
    return replace(choose(tiles, m, n, arch) if whole else tiles[-1], k=k)
