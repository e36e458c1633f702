"""The CUDA layout of weights: pure functions of the host module."""

import pytest

host = pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

SIZES = [(1, 1), (2, 128), (31, 129), (32, 64), (33, 1), (70, 300)]
"""n, k."""


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
