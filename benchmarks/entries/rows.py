"""Entries of the row ops: quantize, dequantize, fake_quantize (forward and backward), int4 packing.

Floors: no arithmetic but the traffic counts for packing; a row op has a handful of fp32 operations
a value (absolute value and maximum, multiply, clamp, round: at least 4; dequantize: 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entry import Cost, Entry, Job, Shape, nbytes, normal, same_bits

FLOATS = (torch.float32, torch.bfloat16)
TOKENS = (
    Shape("SmolLM2", {"rows": 1024, "C": 576}),
    Shape("LLaMA-7B", {"rows": 512, "C": 4096}),
)
WEIGHTS = (
    Shape("SmolLM2", {"rows": 1536, "C": 576}),
    Shape("LLaMA-7B", {"rows": 4096, "C": 4096}),
)


def _values(shape: Shape) -> int:
    return shape["rows"] * shape["C"]


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return normal(shape["rows"], shape["C"], seed=seed, dtype=dtype, device=device)


def _quantize(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x = _rows(shape, dtype, device)

    def call() -> tuple[Tensor, Tensor]:
        return qk.quantize(x, 8)

    return Job(call, {"eager": lambda: eager.quantize(x, 8)}, same_bits(call), 2e-2)


def _quantize_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    values = _values(shape)
    return Cost(values * (nbytes(dtype) + 1) + 4 * shape["rows"], 4 * values)


def _dequantize(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    codes, scale = qk.quantize(_rows(shape, torch.float32, device), 8)

    def call() -> Tensor:
        return qk.dequantize(codes, scale, dtype=dtype)

    baselines = {"eager": lambda: eager.dequantize(codes, scale, dtype)}
    return Job(call, baselines, same_bits(call), 1e-6)


def _dequantize_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    values = _values(shape)
    return Cost(values * (nbytes(dtype) + 1) + 4 * shape["rows"], values)


def _step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the output and the gradient of x."""
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    return y, dx


def _fake_quantize(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x, grad = _rows(shape, dtype, device).requires_grad_(), _rows(shape, dtype, device, 1)

    def call() -> tuple[Tensor, Tensor]:
        return _step(lambda t: qk.fake_quantize(t, 4), x, grad)

    baselines = {"eager": lambda: _step(lambda t: eager.fake_quantize(t, 4), x, grad)}
    if dtype == torch.float32:
        baselines["torch.fake_quantize_per_channel_affine"] = lambda: _step(
            lambda t: eager.fake_quantize_affine(t, 4), x, grad
        )
    # Eager bf16 rounds its quotient to bf16 and lands on the other side of a tie now and then.
    return Job(call, baselines, same_bits(call), 1e-2 if dtype == torch.float32 else 0.2)


def _fake_quantize_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    # The straight-through gradient is the incoming one: the backward pass has no floor.
    return Cost(_values(shape) * 2 * nbytes(dtype), 5 * _values(shape))


def _codes(shape: Shape, device: torch.device) -> Tensor:
    return qk.quantize(_rows(shape, torch.float32, device), 4)[0]


def _pack(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    codes = _codes(shape, device)

    def call() -> Tensor:
        return qk.pack_int4(codes)

    return Job(call, {"eager": lambda: eager.pack_int4(codes)}, same_bits(call), 0.0)


def _unpack(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    packed = qk.pack_int4(_codes(shape, device))

    def call() -> Tensor:
        return qk.unpack_int4(packed)

    return Job(call, {"eager": lambda: eager.unpack_int4(packed)}, same_bits(call), 0.0)


def _pack_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    return Cost(_values(shape) * 3 // 2)


ENTRIES = (
    Entry("quantize", "8 bit", TOKENS, FLOATS, _quantize_cost, _quantize),
    Entry("dequantize", "8 bit", TOKENS, FLOATS, _dequantize_cost, _dequantize),
    Entry(
        "fake_quantize",
        "4 bit, forward and backward",
        WEIGHTS,
        FLOATS,
        _fake_quantize_cost,
        _fake_quantize,
    ),
    Entry("pack_int4", "", WEIGHTS, (torch.int8,), _pack_cost, _pack),
    Entry("unpack_int4", "", WEIGHTS, (torch.int8,), _pack_cost, _unpack),
)
