"""Tiles of whole rows: every row length fits, and the heuristics do what their text says."""

import pytest

from llmqat_kernels.backends.triton import row_tiles


def test_every_tile_covers_its_row():
    for columns in range(1, row_tiles.MAX_COLUMNS + 1):
        tile = row_tiles.row_tile(columns)
        assert tile.width & (tile.width - 1) == 0
        assert tile.chunks * tile.width >= columns > (tile.chunks - 1) * tile.width
        # The tree over chunks and the tree inside one make the tree of the padded row (spec 11).
        padded = row_tiles.next_power_of_two(tile.chunks) * tile.width
        assert padded == max(row_tiles.next_power_of_two(columns), row_tiles.SHORTEST)
        assert tile.rows == 1 or tile.chunks == 1
        elements = tile.rows * tile.width * tile.chunks // (32 * tile.num_warps)
        assert 8 <= elements <= 64


def test_the_longest_rows_have_every_width_and_the_most_chunks():
    most = {}
    for columns in range(1, row_tiles.MAX_COLUMNS + 1):
        tile = row_tiles.row_tile(columns)
        width = tile.rows * tile.width, tile.num_warps
        most[width] = max(tile.chunks, most.get(width, 0))
    listed = [row_tiles.row_tile(columns) for columns in row_tiles.LONGEST_OF_TILES]
    assert {(t.rows * t.width, t.num_warps): t.chunks for t in listed} == most


def test_real_rows_waste_few_lanes():
    for columns in row_tiles.ROW_LENGTHS:
        tile = row_tiles.row_tile(columns)
        assert columns / (tile.width * tile.chunks) >= 0.75


@pytest.mark.parametrize("columns", [1, 3, 64, 1000, 1024, 10**6])
def test_flat_tile_is_1024_elements(columns):
    tile = row_tiles.flat_tile(columns)
    assert tile.rows * tile.width == 1024
    assert tile.width >= min(columns, 1024)


def test_next_power_of_two():
    assert [row_tiles.next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]
