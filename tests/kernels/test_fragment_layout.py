"""The CUDA layout of weights and the cut of the work: pure functions of the host module."""

import itertools

import pytest

host = pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

SIZES = [(1, 1), (2, 128), (31, 129), (32, 64), (33, 1), (70, 300)]
"""n, k."""
MULTIPROCESSORS = (1, 2, 78, 108, 132, 144)


@pytest.mark.parametrize("nibbles", [True, False])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_layout_is_a_permutation_with_an_inverse(n, k, nibbles):
    size = host.fragment_layout_bytes(nibbles, n, k)
    nibbles_of_byte = (0, 1) if nibbles else (-1,)
    seen = {}
    for byte in range(size):
        for high in nibbles_of_byte:
            channel, column = host.fragment_code(nibbles, n, k, byte, high)
            if channel < n and column < k:
                assert (channel, column) not in seen
                seen[channel, column] = (byte, high)
    assert len(seen) == n * k, "every code has one place"
    for (channel, column), place in seen.items():
        assert host.fragment_place(nibbles, n, k, channel, column) == place


@pytest.mark.parametrize("nibbles", [True, False])
def test_a_load_is_a_fragment(nibbles):
    """The 16 bytes of lane 4 g + t are rows g, g + 8 and columns 4 t of both halves of 32 k, with
    the channels and k that the fragment's rows and columns stand for."""
    n, k = 32, 128
    for lane in range(32):
        group, quarter = divmod(lane, 4)
        for fragment in range(4):
            load = fragment if nibbles else 2 * fragment
            for word in range(4):
                side, row = divmod(word, 2)
                for i in range(4):
                    byte = load * 512 + lane * 16 + word * 4 + i
                    channel = 2 * group + row
                    column = fragment // 2 * 64 + quarter * 16 + fragment % 2 * 8 + side * 4 + i
                    first = host.fragment_code(nibbles, n, k, byte, 1 if nibbles else -1)
                    second = host.fragment_code(nibbles, n, k, byte + (0 if nibbles else 512), 0)
                    assert first == (channel, column) and second == (channel + 16, column)


def test_gate_and_up_share_a_byte():
    n, k = 2 * 11008, 4096
    for i in (0, 17, 11007):
        gate = host.fragment_place(True, n, k, i, 77)
        up = host.fragment_place(True, n, k, 11008 + i, 77)
        assert gate[0] == up[0] and (gate[1], up[1]) == (1, 0)


def test_real_sizes_are_not_padded():
    for n, k in ((3 * 4096, 4096), (4096, 11008), (2 * 13824, 5120), (6656, 17920)):
        assert host.fragment_layout_bytes(True, n, k) == n * k // 2
        assert host.fragment_layout_bytes(False, n, k) == n * k


@pytest.mark.parametrize("sms", MULTIPROCESSORS)
@pytest.mark.parametrize(("tile_blocks", "stages"), [(1, 1), (3, 5), (32, 16), (172, 16), (32, 43)])
def test_every_unit_is_covered_once(tile_blocks, stages, sms):
    units = tile_blocks * stages
    blocks = host.linear_blocks(units, sms)
    assert 1 <= blocks <= min(units, 2 * sms)
    first = [host.linear_first_unit(units, blocks, b) for b in range(blocks + 1)]
    assert first[0] == 0 and first[-1] == units
    counts = [b - a for a, b in itertools.pairwise(first)]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1, "even, and no idle block"
    for block in range(blocks):
        for unit in {first[block], first[block + 1] - 1}:
            assert host.linear_owner(units, blocks, unit) == block


def test_partial_sums_of_two_tiles_never_share_a_slot():
    """A slot is the block that owns the tile's first unit: distinct for tiles that blocks share."""
    for tile_blocks, stages, sms in ((32, 16, 132), (172, 16, 132), (5, 3, 2), (400, 2, 1)):
        units = tile_blocks * stages
        blocks = host.linear_blocks(units, sms)
        slots = []
        for tile in range(tile_blocks):
            owners = {host.linear_owner(units, blocks, tile * stages + s) for s in range(stages)}
            if len(owners) > 1:
                slots.append(min(owners))
        assert len(slots) == len(set(slots))


def test_float_splits_fit_the_workspace_and_ignore_m():
    for tile_blocks in (1, 3, 32, 172, 1000):
        for sms in MULTIPROCESSORS:
            for stages in (1, 4, 16, 43):
                splits = host.linear_float_splits(tile_blocks, stages, sms)
                assert 1 <= splits <= stages
                assert splits == 1 or tile_blocks * splits <= 2 * sms


def test_workspace_has_a_ticket_and_a_slot_for_every_block():
    for sms in MULTIPROCESSORS:
        values = 128 * 2 * 8 * 4  # threads, halves, token tiles, values of a thread
        assert host.linear_workspace_bytes(sms) == 8192 + 2 * sms * values * 4
        assert 2 * sms * 4 <= 8192


def test_token_tiles():
    tiles = [host.linear_token_tiles(m) for m in (1, 8, 9, 16, 17, 32, 33, 64)]
    assert tiles == [1, 1, 2, 2, 4, 4, 8, 8]
