"""fake_quantize_channels: spec 24."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.spec import channels as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator, layouts, special_rows


def test_hand_written_values(backend):
    x = torch.tensor([[7.0, 0.4, 0.0], [-3.6, 0.5, 1.0], [0.6, 1.4, -7.0]])
    want = torch.tensor([[7.0, 0.4, 0.0], [-4.0, 0.4, 1.0], [1.0, 1.4, -7.0]])
    got = qk.fake_quantize_channels(x, 4, group_size=1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    # One scale for all three columns: 7 / 7.
    assert qk.fake_quantize_channels(x, 4, group_size=3).tolist() == [
        [7.0, 0.0, 0.0],
        [-4.0, 0.0, 1.0],
        [1.0, 1.0, -7.0],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group_size"), [(1, 1), (6, 2), (63, 7), (130, 1), (257, 257)])
def test_backends_equal_spec(backend, dtype, columns, group_size):
    x = special_rows(columns, dtype)
    finite = x[torch.isfinite(x).all(-1)]
    for rows in (x, finite, finite * 1e-32, torch.zeros_like(finite), finite[:1]):
        for bits in (2, 4, 8):
            got = qk.fake_quantize_channels(rows, bits, group_size=group_size)
            assert_same_bits(got, spec.fake_quantize_channels(rows, bits, group_size))


def test_a_group_is_a_row_of_quantize(backend):
    x = torch.randn(5, 12, generator=generator(0))
    got = qk.fake_quantize_channels(x, 4, group_size=3)
    for group in range(4):
        part = x[:, 3 * group : 3 * group + 3]
        want = qk.fake_quantize(part.reshape(1, -1), 4).reshape(part.shape)
        assert_same_bits(got[:, 3 * group : 3 * group + 3], want)


def test_a_poisoned_group_leaves_the_others(backend):
    x = torch.randn(9, 8, generator=generator(1))
    x[4, 2] = float("inf")
    y = qk.fake_quantize_channels(x, 4, group_size=2)
    assert y[:, 2:4].isnan().all()
    rest = [0, 1, 4, 5, 6, 7]
    assert_same_bits(y[:, rest], qk.fake_quantize_channels(x[:, rest], 4, group_size=2))


def test_leading_dimensions_are_rows_and_layouts_do_not_matter(backend):
    x = torch.randn(6, 34, generator=generator(5))
    want = qk.fake_quantize_channels(x, 4, group_size=2)
    got = qk.fake_quantize_channels(x.reshape(2, 3, 34), 4, group_size=2)
    assert_same_bits(got, want.reshape(2, 3, 34))
    for name, view in layouts(x):
        got = qk.fake_quantize_channels(view, 4, group_size=2)
        assert_same_bits(got, want.expand(got.shape), name)


def test_many_tiles_of_rows(backend):
    x = torch.randn(300, 9, generator=generator(6))
    x[299, 3] = 50.0
    assert_same_bits(
        qk.fake_quantize_channels(x, 4, group_size=3), spec.fake_quantize_channels(x, 4, 3)
    )


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(backend, shape):
    assert qk.fake_quantize_channels(torch.empty(shape), 4, group_size=4).shape == shape


def test_straight_through_gradient(backend):
    x = torch.randn(4, 32, generator=generator(2)).mul_(2).requires_grad_()
    upstream = torch.randn(4, 32, generator=generator(3))
    (qk.fake_quantize_channels(x, 4, group_size=4) * upstream).sum().backward()
    assert_same_bits(x.grad, upstream)
    x.grad = None
    (qk.fake_quantize_channels(x, 4, group_size=4, ste_clip=2.0) * upstream).sum().backward()
    assert_same_bits(x.grad, torch.where(x.detach().abs() < 2.0, upstream, torch.zeros(())))


def test_instruction_sets_agree(isa):
    for dtype in DTYPES:
        x = torch.randn(33, 261, generator=generator(9)).to(dtype)
        x[:, ::9] *= 1e-3
        x[3, 5] = float("inf")
        for bits, size in ((4, 1), (8, 3), (2, 261)):
            got = qk.fake_quantize_channels(x, bits, group_size=size)
            assert_same_bits(got, spec.fake_quantize_channels(x, bits, size))


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (dict(bits=16), qk.InvalidArgument, "bits"),
        (dict(group_size=-1), qk.InvalidArgument, "group_size"),
        (dict(group_size=3), qk.InvalidArgument, "group_size"),
        (dict(x=torch.ones(2, 8, dtype=torch.int8)), qk.InvalidArgumentType, "x"),
        (dict(ste_clip=-1.0), qk.InvalidArgument, "ste_clip"),
    ],
)
def test_bad_arguments(change, error, word):
    arguments = {"x": torch.ones(2, 8), "bits": 4, "group_size": 4} | change
    x, bits = arguments.pop("x"), arguments.pop("bits")
    with pytest.raises(error, match=word):
        qk.fake_quantize_channels(x, bits, **arguments)
