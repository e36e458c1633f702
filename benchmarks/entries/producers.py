"""Entries of the producers: a normalisation or an activation fused with the quantization after it.

Floors: inputs once, codes and scales once (and the new residual stream for the norm). Arithmetic:
at least 9 fp32 operations a value of the norm (sum of squares, two multiplies, four of quantize),
15 of SiLU (exponential of degree 6, division, multiply, four of quantize).
"""

from __future__ import annotations

import torch
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entry import Cost, Entry, Job, Shape, nbytes, normal, same_bits

FLOATS = (torch.float32, torch.bfloat16)
EPS = 1e-5
HIDDEN = (
    Shape("SmolLM2", {"rows": 1, "C": 576}),
    Shape("SmolLM2", {"rows": 512, "C": 576}),
    Shape("LLaMA-7B", {"rows": 512, "C": 4096}),
)
INNER = (
    Shape("SmolLM2", {"rows": 1, "C": 1536}),
    Shape("SmolLM2", {"rows": 512, "C": 1536}),
    Shape("LLaMA-7B", {"rows": 128, "C": 11008}),
)


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return normal(shape["rows"], shape["C"], seed=seed, dtype=dtype, device=device)


def _norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x, residual = _rows(shape, dtype, device, 0), _rows(shape, dtype, device, 1)
    weight = normal(shape["C"], seed=2, dtype=dtype, device=device)

    def call() -> tuple[Tensor, ...]:
        return qk.rms_norm_quantize(x, weight, EPS, 8, residual=residual)

    def plain() -> tuple[Tensor, ...]:
        total = x + residual
        return (*eager.rms_norm_quantize(total, weight, EPS, 8), total)

    return Job(call, {"x + residual, F.rms_norm, eager quantize": plain}, same_bits(call), 2e-2)


def _norm_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    values = shape["rows"] * shape["C"]
    traffic = values * (3 * nbytes(dtype) + 1) + 4 * shape["rows"] + shape["C"] * nbytes(dtype)
    return Cost(traffic, 9 * values)


def _silu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    gate, up = _rows(shape, dtype, device, 0), _rows(shape, dtype, device, 1)

    def call() -> tuple[Tensor, Tensor]:
        return qk.silu_mul_quantize(gate, up, 8)

    baselines = {"F.silu(gate) * up, eager quantize": lambda: eager.silu_mul_quantize(gate, up, 8)}
    return Job(call, baselines, same_bits(call), 2e-2)


def _silu_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    values = shape["rows"] * shape["C"]
    return Cost(values * (2 * nbytes(dtype) + 1) + 4 * shape["rows"], 15 * values)


ENTRIES = (
    Entry("rms_norm_quantize", "8 bit, with residual", HIDDEN, FLOATS, _norm_cost, _norm),
    Entry("silu_mul_quantize", "8 bit", INNER, FLOATS, _silu_cost, _silu),
)
