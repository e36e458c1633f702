"""Tiles of the kernels that hold whole rows in registers: pure functions, tested on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

MAX_COLUMNS = 32_768
"""Longest row that one program holds: 64 elements a lane at 16 warps."""
ROW_LENGTHS = (64, 576, 1536, 4096, 5120, 8192, 11008, 28672)
"""Row lengths of real models (and of a group) for ahead-of-time compilation."""
LANE_ELEMENTS = 8
"""Consecutive elements of a lane: 16 bytes of bf16."""
WARP_ELEMENTS = 32 * LANE_ELEMENTS
LARGEST_ROW = ((1024, 1), (2048, 2), (6144, 4), (16_384, 8), (MAX_COLUMNS, 16))
"""(columns, warps): few warps, because a sum in a fixed order costs barriers for each doubling of
them, and 32 to 64 elements a lane, which is what keeps enough loads in flight."""


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

    def constants(self) -> dict[str, int]:
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
        width = next_power_of_two(columns)
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
    width = min(next_power_of_two(columns), 1024)
    return FlatTile(1024 // width, width)
