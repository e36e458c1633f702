"""Groups of channels that share a scale over all tokens: spec 24 (W4A4 of LLM-QAT table 8)."""

from __future__ import annotations

from torch import Tensor

from .quantize import fake_quantize


def fake_quantize_channels(
    x: Tensor, bits: int, group_size: int, ste_clip: float | None = None
) -> Tensor:
    """x [..., C] with one scale per ``group_size`` columns, over all rows together (spec 24).

    ``ste_clip`` only matters to the gradient.
    """
    groups = x.shape[-1] // group_size
    # One long row per group: the rows of spec 2.
    rows = x.reshape(-1, groups, group_size).transpose(0, 1)
    values = fake_quantize(rows.reshape(groups, rows.shape[1] * group_size), bits)
    return values.reshape(rows.shape).transpose(0, 1).reshape(x.shape)
