"""How the CUDA product with integer group scales is cut into blocks of threads."""

import pytest

host = pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

SHAPES = ((4096, 4096), (128, 38_336), (7, 64), (22_016, 4096), (12_288, 4096), (4096, 11_008))
SMS = 108


@pytest.mark.parametrize("m, tokens, channels", [(1, 8, 64), (8, 8, 64), (9, 64, 128)])
def test_tiles_by_token_count(m, tokens, channels):
    for n, k in SHAPES:
        got, _, tiles, _ = host.int4_plan(m, n, k, True, SMS)
        assert got == tokens and tiles == -(-n // channels)


@pytest.mark.parametrize("m", [1, 8, 9, 64, 4096])
def test_parts_of_k(m):
    """About two blocks a multiprocessor where k allows it; no part without work, none too long."""
    for n, k in SHAPES:
        tokens, splits, tiles, size = host.int4_plan(m, n, k, True, SMS)
        stages = -(-k // 256)
        assert 1 <= splits <= stages and -(-stages // splits) <= 64
        assert splits * tiles >= SMS or stages // (splits + 1) < 2
        assert size == (splits > 1) * splits * tiles * tokens * (64 if tokens == 8 else 128) * 4


def test_what_tiles_cannot_read():
    assert host.int4_plan(5, 4096, 4096, False, SMS) == (0, 1, 0, 0)
    for shape in ((0, 5, 64), (5, 0, 64), (5, 5, 0)):
        assert host.int4_plan(*shape, True, SMS)[0] == 0
