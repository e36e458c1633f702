"""What a launch promises the compiler of its arguments: pure functions of them."""

from types import SimpleNamespace

import pytest
import torch

from llmqat_kernels.backends.triton.launch import aligned, multiples, rows_near
from llmqat_kernels.testing import assert_same_bits

KERNEL = SimpleNamespace(
    params=[
        SimpleNamespace(name=name, do_not_specialize=name in ("rows", "index"))
        for name in ("x", "index", "rows", "columns", "eps")
    ]
)
X = torch.zeros(65)


@pytest.mark.parametrize(
    ("arguments", "promised"),
    [
        ((X, X, 3, 64, 1e-5), True),
        ((X, X[1:], 3, 64, 1e-5), True),  # nothing is asked of index and rows
        ((X[4:], None, 1, 0, 1e-5), True),
        ((X[1:], X, 16, 64, 1e-5), False),
        ((X, X, 16, 1, 1e-5), False),
        ((X, X, 16, 40, 1e-5), False),
    ],
)
def test_all_or_nothing_is_promised(arguments, promised):
    assert multiples(KERNEL, arguments) is promised


def test_what_begins_between_two_vectors_is_copied():
    assert aligned(X) is X
    moved = aligned(X[1:])
    assert moved.data_ptr() % 16 == 0
    assert_same_bits(moved, X[1:])
    assert aligned(X.view(5, 13).T).is_contiguous()


def test_rows_of_a_wider_tensor_stay_a_view():
    x = torch.zeros(4, 6)
    assert rows_near(x[:, 1:3]).data_ptr() == x[:, 1:3].data_ptr()
    assert rows_near(x[:, ::2]).is_contiguous()
    far = torch.zeros(1, 1).as_strided((1, 1), (2**31, 1))
    assert rows_near(far).stride(0) < 2**31
