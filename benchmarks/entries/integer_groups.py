"""Entry of `integer_group_matmul`: 4-bit weights in groups whose scales are integers (spec 18).

Floors: as `quantized_matmul`, and a byte for each multiplier.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entries.linears import (
    GPU_FEW,
    SERVED,
    int_mm_runs,
    layout_of,
    product_cost,
    short,
    weight_of,
)
from benchmarks.entry import Call, Cost, Entry, Grid, Job, Shape, normal, same_bits

ops = torch.ops.llmqat
LARGEST_GROUP = 128


def _group(shape: Shape) -> int:
    """At least two groups a row."""
    return math.gcd(LARGEST_GROUP, shape["K"] // 2)


def _integer_groups(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    size, w = _group(shape), weight_of(shape, device)
    x = normal(shape["M"], shape["K"], seed=0, dtype=dtype, device=device)
    codes, multiplier, scale = qk.quantize_integer_groups(w, 4, group_size=size)
    packed, groups = qk.pack_int4(codes), multiplier.float() * scale.unsqueeze(-1)
    a, a_scale = qk.quantize(x, 8)
    both = a_scale.unsqueeze(-1) * scale
    dense = qk.dequantize(codes, groups, group_size=size, dtype=dtype)
    # As the engine holds it: only the CPU's kernel reads the layout of repack_weight.
    repacked = layout_of(packed, 4)
    held = repacked if device.type == "cpu" else lambda: packed

    def call() -> Tensor:
        return ops.integer_group_matmul(a, a_scale, held(), multiplier, scale, None, size, dtype)

    def floats() -> Tensor:
        return ops.repacked_matmul(a, a_scale, repacked(), groups, None, shape["N"], 4, size, dtype)

    baselines: dict[str, Call] = {
        f"F.linear {short(dtype)}": lambda: F.linear(x, dense),
        "own, scales of groups in fp32": floats,
    }
    if int_mm_runs(shape, device):
        baselines["torch._int_mm for each group"] = lambda: eager.integer_groups(
            a, codes, multiplier, both, size, dtype
        )
    return Job(call, baselines, same_bits(call), 3e-2)


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    base = product_cost(4)(shape, dtype)
    return Cost(base.bytes + shape["N"] * (shape["K"] // _group(shape)), 0, base.int_ops)


ENTRIES = (
    Entry(
        "integer_group_matmul",
        "W4A8",
        _cost,
        _integer_groups,
        Grid(SERVED, (torch.float32,)),
        GPU_FEW,
    ),
)
