"""Every operator that does work of its own, with shapes, floors, baselines and a gate.

``ENTRIES`` is the table; ``NOT_ON_ITS_OWN`` says where the time of the other operators shows, so
that together they account for every schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.entries import (
    attention,
    heads,
    integer_groups,
    linears,
    producers,
    repacked_linear,
    rows,
)
from benchmarks.entry import Cost, Entry, Job, Shape
from llmqat_kernels.errors import InvalidArgument

ENTRIES: tuple[Entry, ...] = (
    *rows.ENTRIES,
    *linears.ENTRIES,
    *integer_groups.ENTRIES,
    *repacked_linear.ENTRIES,
    *producers.ENTRIES,
    *attention.ENTRIES,
    *heads.ENTRIES,
)

NOT_ON_ITS_OWN = {
    "fake_quantize_backward": "in fake_quantize with a clipped gradient; otherwise nothing runs",
    "int_matmul": "the accumulators of quantized_matmul, exposed for tests",
    "qat_matmul_backward_input": "in qat_matmul and qat_linear, forward and backward",
    "qat_matmul_backward_weight": "in qat_matmul and qat_linear, forward and backward",
    "quantize_integer_groups": "once an optimizer step; the product is integer_group_matmul",
    "repack_weight": "runs once, when a model is loaded",
    "repacked_matmul_silu_mul": "repacked_matmul of a stacked weight and silu_mul in one",
    "repacked_matmul_add": "repacked_matmul with a residual read where the result is written",
    "repacked_linear_add": "repacked_linear with a residual read where the result is written",
    "rms_norm": "the first half of rms_norm_quantize",
    "rms_norm_backward": "in rms_norm_quantize_train, forward and backward",
    "silu_mul": "the first half of silu_mul_quantize",
    "silu_mul_qat_matmul": "silu_mul_quantize_train and qat_matmul, without keeping codes",
    "silu_mul_backward": "in silu_mul_quantize_train, forward and backward",
    "rope_quantize_append_paged": "rope_quantize_append with one look-up a token",
    "rope_quantize_append_queries": "rope_quantize_append and rope of the queries in one",
    "attention_decode_paged": "attention_decode with one look-up in 64 tokens",
    "attention_decode_quantize": "attention_decode and quantize of one row a query",
    "rope": "in rope_quantize_append and rope_fake_quantize",
}


@dataclass(frozen=True)
class Case:
    """One entry at one shape and dtype: one row of the table."""

    entry: Entry
    shape: Shape
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Op and variant."""
        return f"{self.entry.op} {self.entry.variant}".strip()

    @property
    def dtype_name(self) -> str:
        """``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def cost(self) -> Cost:
        """Least traffic and arithmetic of one call."""
        return self.entry.cost(self.shape, self.dtype)

    def build(self, device: torch.device) -> Job:
        """Tensors on ``device`` and the calls on them."""
        return self.entry.build(self.shape, self.dtype, device)


def op_names() -> tuple[str, ...]:
    """The operators of the table, in its order."""
    return tuple(dict.fromkeys(entry.op for entry in ENTRIES))


def cases(
    ops: Sequence[str] | None = None, quick: bool = False, device_type: str = "cpu"
) -> Iterator[Case]:
    """The rows of the table on a type of device; of some operators only, and with ``quick`` the
    first shape and dtype of each entry.

    Raises:
        InvalidArgument: an operator that has no entry.
    """
    for op in ops or ():
        if op not in op_names():
            elsewhere = NOT_ON_ITS_OWN.get(op)
            hint = f"its time: {elsewhere}" if elsewhere else f"use {', '.join(op_names())}"
            raise InvalidArgument(f"op: {op!r} has no entry; {hint}")
        if not any(e.op == op and e.grid(device_type).shapes for e in ENTRIES):
            raise InvalidArgument(f"op: {op!r} has no sizes on {device_type}; use another --device")
    for entry in ENTRIES:
        if ops and entry.op not in ops:
            continue
        grid = entry.grid(device_type)
        for shape in grid.shapes[:1] if quick else grid.shapes:
            for dtype in grid.dtypes[:1] if quick else grid.dtypes:
                yield Case(entry, shape, dtype)
