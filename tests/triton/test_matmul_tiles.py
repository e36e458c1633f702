"""The choice of tiles: pure functions of the sizes."""

import pytest

from llmqat_kernels.backends.triton.matmul_tiles import (
    CODES,
    MULTIPROCESSORS,
    PAIRS,
    code_tile,
    group_steps,
    pair_tile,
)


@pytest.mark.parametrize("arch", [80, 90])
def test_large_problems_take_the_largest_tile(arch):
    assert code_tile(4096, 4096, arch) == CODES[arch][0]
    assert pair_tile(4096, 2048, arch) == PAIRS[arch][0]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", [1, 4096, 28672])
def test_a_tile_is_at_least_half_full_of_tokens(arch, n):
    for m in (1, 7, 16, 17, 33, 64, 100, 129, 1000):
        tile = code_tile(m, n, arch)
        assert tile.m == 16 or tile.m < 2 * m


@pytest.mark.parametrize("arch", [80, 90])
def test_every_multiprocessor_has_work_where_that_is_possible(arch):
    for m, n in ((128, 4096), (512, 4096), (128, 11008), (2048, 576)):
        tile = code_tile(m, n, arch)
        smallest = min(t.m * t.n for t in CODES[arch] if t.m <= 2 * m - 1)
        programs = -(-m // tile.m) * -(-n // tile.n)
        assert programs >= MULTIPROCESSORS[arch] or -(-m * n // smallest) < MULTIPROCESSORS[arch]


@pytest.mark.parametrize(
    ("group_size", "steps"),
    [
        (1, (32, 1, False)),
        (32, (32, 1, True)),
        (64, (64, 1, True)),
        (96, (64, 2, False)),
        (100, (64, 2, False)),
        (128, (128, 1, True)),
        (256, (128, 2, True)),
    ],
)
def test_steps_of_a_group(group_size, steps):
    assert group_steps(group_size) == steps


@pytest.mark.parametrize(("group_size", "steps"), [(32, (32, 1, False)), (128, (64, 2, False))])
def test_steps_in_rows_that_begin_anywhere_are_short_and_padded(group_size, steps):
    assert group_steps(group_size, regular=False) == steps
