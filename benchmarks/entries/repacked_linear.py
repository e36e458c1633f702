"""Entries of `repacked_linear`: float activations times codes in the kernel layout.

Floors: as `quantized_linear` with float activations: the codes at their width, scales, activations
and result once; 2MNK floating-point operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entries.linears import LLAMA, SMOL, layout_of, linear_cost, operands
from benchmarks.entry import Call, Entry, Grid, Job, Shape, within_ratio
from llmqat_kernels import dispatch
from llmqat_kernels.testing import assert_same_bits

SHAPES = tuple(
    Shape(model, {"M": rows, **sizes})
    for model, sizes in (("SmolLM2", SMOL), ("LLaMA-7B", LLAMA))
    for rows in (1, 2, 4, 16, 256)
)
DEQUANTIZED = "float_matmul of the dequantized weight"


def _repacked_linear(w_bits: int) -> Callable[..., Job]:
    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        x, codes, scale = operands(shape, dtype, device, w_bits)
        dense = eager.dequantize(codes, scale, dtype)
        half, half_x = dense.bfloat16(), x.bfloat16()
        n, layout, floats = shape["N"], layout_of(codes, w_bits), layout_of(dense, 16)

        def call() -> Tensor:
            return qk.repacked_linear(x, layout(), scale, n=n, w_bits=w_bits)

        def dequantized() -> Tensor:
            return qk.float_matmul(x, floats(), n=n)

        ratio = within_ratio(call, lambda: x.double() @ dense.double().T)

        def gate() -> None:
            if dispatch.resolve("repacked_linear", device.type, "auto").backend == "cpu":
                assert_same_bits(call(), dequantized(), DEQUANTIZED)  # spec 17
            ratio()

        baselines: dict[str, Call] = {
            "F.linear fp32": lambda: F.linear(x, dense),
            "F.linear bf16": lambda: F.linear(half_x, half),
            DEQUANTIZED: dequantized,
        }
        return Job(call, baselines, gate, 3e-2)

    return build


ENTRIES = tuple(
    Entry(
        "repacked_linear",
        f"W{bits}A16",
        linear_cost(bits, 16),
        _repacked_linear(bits),
        Grid(SHAPES, (torch.float32,)),
    )
    for bits in (8, 4)
)
