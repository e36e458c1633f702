"""Cases, layouts and guard bands shared by the tests of every operator and by users' own
kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .spec.quantize import qmax

ROW_LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 576, 1025)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def generator(seed: int) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)


def special_rows(columns: int, dtype: torch.dtype) -> Tensor:
    """Rows that break careless kernels: zeros, outliers, ties, denormals, NaN and Inf. [n,
    columns].
    """
    base = torch.randn(columns, generator=generator(columns))
    rows = [torch.zeros(columns), base, base * 1e-30, torch.full((columns,), 3.0), -base.abs()]
    for value in (1e4, float("nan"), float("inf"), float("-inf")):
        row = base.clone()
        row[columns // 2] = value
        rows.append(row)
    tiny = torch.full((columns,), torch.finfo(dtype).tiny / 4)
    rows.append(tiny * torch.sign(base))
    rows.extend(tie_row(columns, bits) for bits in (4, 8))
    return torch.stack(rows).to(dtype)


def tie_row(columns: int, bits: int) -> Tensor:
    """A row whose scale is exactly 1 and whose other elements lie exactly between two codes.
    [columns].
    """
    limit = qmax(bits)
    row = torch.arange(columns, dtype=torch.float32) % (2 * limit) - limit + 0.5
    row[0] = limit
    return row


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values as ``x`` [rows, C] in other memory layouts."""
    yield "contiguous", x.contiguous()
    yield "transposed", x.t().contiguous().t()
    wide = x.new_zeros((x.shape[0], 2 * x.shape[1]))
    wide[:, ::2] = x
    yield "strided columns", wide[:, ::2]
    tall = x.new_zeros((2 * x.shape[0], x.shape[1]))
    tall[1::2] = x
    yield "strided rows", tall[1::2]
    flat = x.new_zeros(x.numel() + 3)
    flat[3:] = x.reshape(-1)
    yield "misaligned", flat[3:].view(x.shape)
    yield "three dimensions", x.reshape(1, *x.shape).expand(2, -1, -1)[1]


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Bitwise equality including NaN payload class: NaN equals NaN, -0 differs from +0 only by
    value.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)} is not "
            f"{expected.dtype} {tuple(expected.shape)}"
        )
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        where = (~same).nonzero()[0].tolist()
        pair = (actual[tuple(where)].item(), expected[tuple(where)].item())
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {where}: {pair}"
        )


def assert_within_ratio(
    actual: Tensor, baseline: Tensor, exact: Tensor, ratio: float = 2.0, slack: float = 1e-6
) -> None:
    """The ratio rule: the error against fp64 ``exact`` is at most ``ratio`` times plain torch's
    own error.
    """
    error = (actual.double() - exact).abs().max().item() if actual.numel() else 0.0
    allowed = ratio * ((baseline.double() - exact).abs().max().item() if baseline.numel() else 0.0)
    floor = slack * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    if not error <= allowed + floor:
        raise AssertionError(
            f"error {error:.3g} exceeds {ratio} x baseline = {allowed:.3g} (+ {floor:.3g})"
        )
