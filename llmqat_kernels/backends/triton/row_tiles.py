"""Tiles of the kernels that hold whole rows in registers: pure functions, tested on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_COLUMNS = 32_768
"""Longest row that one program holds: 64 elements a lane at 16 warps."""
MAX_ODD_COLUMNS = 16_384
"""The same of rows that are no multiple of 16 elements: they are loaded element by element, which
takes more registers."""
ROW_LENGTHS = (64, 576, 1536, 2048, 4096, 5120, 8192, 11008, 28672)
"""Row lengths of real models (and of a group) for ahead-of-time compilation."""
LONGEST_OF_TILES = (64, 1024, 1536, 6144, 16_384, MAX_COLUMNS)
"""A short row (all tiles of several rows hold 1024 elements), and the longest row of each width of
tile: it has the most chunks, and so the most registers."""
LANE_ELEMENTS = 8
"""Consecutive elements of a lane: 16 bytes of bf16."""
SHORTEST = 16
"""Elements of the narrowest tile; nobody has shorter rows but tests."""
WARP_ELEMENTS = 32 * LANE_ELEMENTS
LARGEST_ROW = ((1024, 1), (1536, 2), (6144, 4), (16_384, 8), (MAX_COLUMNS, 16))
"""(columns, warps): few warps, because a sum in a fixed order costs barriers for each doubling of
them, and 24 to 64 elements a lane, which is what keeps enough loads in flight. 2048 columns of fp32
and an fp32 weight would spill from two warps."""


@dataclass(frozen=True)
class RowTile:
    """``rows`` rows a program, each as ``chunks`` pieces of ``width`` elements, a power of two.

    The pieces are separate register tensors: the upper levels of a sum or maximum are plain
    instructions of a lane, and only the last piece is masked.
    """

    rows: int
    width: int
    chunks: int
    num_warps: int

    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {"ROWS": self.rows, "WIDTH": self.width, "CHUNKS": self.chunks}


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n`` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def row_tile(columns: int) -> RowTile:
    """The tile for rows of ``columns`` elements, at most ``MAX_COLUMNS``.

    Short rows (groups) share a program, so that no lane is idle.
    """
    if columns <= WARP_ELEMENTS:
        width = max(next_power_of_two(columns), SHORTEST)
        return RowTile(4 * WARP_ELEMENTS // width, width, 1, 2)
    warps = next(warps for limit, warps in LARGEST_ROW if columns <= limit)
    width = WARP_ELEMENTS * warps
    return RowTile(1, width, -(-columns // width), warps)


@dataclass(frozen=True)
class FlatTile:
    """``rows`` x ``width`` elements a program of an elementwise kernel, 4 warps."""

    rows: int
    width: int


def flat_tile(columns: int) -> FlatTile:
    """The tile of an elementwise kernel over rows of ``columns`` elements: 8 elements a lane."""
    width = min(max(next_power_of_two(columns), SHORTEST), 1024)
    return FlatTile(1024 // width, width)
