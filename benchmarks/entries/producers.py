"""Entries of the producers: a normalisation or an activation fused with the quantization after it.

Floors: inputs once, codes and scales once (and the new residual stream for the norm). Arithmetic:
at least 9 fp32 operations a value of the norm (sum of squares, two multiplies, four of quantize),
15 of SiLU (exponential of degree 6, division, multiply, four of quantize). The training forms leave
y out (its consumers read codes); their backward reads the gradient and the saved inputs and writes
the gradients of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entry import (
    Call,
    Cost,
    Entry,
    Grid,
    Job,
    Shape,
    everything,
    nbytes,
    normal,
    on_reference,
    same_bits,
)
from llmqat_kernels.testing import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16)
BF16 = (torch.bfloat16,)
EPS = 1e-5
HIDDEN = Grid(
    (
        Shape("SmolLM2", {"rows": 1, "C": 576}),
        Shape("SmolLM2", {"rows": 512, "C": 576}),
        Shape("LLaMA-7B", {"rows": 512, "C": 4096}),
    ),
    FLOATS,
)
INNER = Grid(
    (
        Shape("SmolLM2", {"rows": 1, "C": 1536}),
        Shape("SmolLM2", {"rows": 512, "C": 1536}),
        Shape("LLaMA-7B", {"rows": 128, "C": 11008}),
    ),
    FLOATS,
)
GPU_HIDDEN = Grid(
    (
        Shape("LLaMA-7B", {"rows": 2048, "C": 4096}),
        Shape("LLaMA-13B", {"rows": 4096, "C": 5120}),
        Shape("LLaMA-30B", {"rows": 4096, "C": 6656}),
    ),
    BF16,
)
GPU_INNER = Grid(
    (
        Shape("LLaMA-7B", {"rows": 2048, "C": 11008}),
        Shape("LLaMA-13B", {"rows": 4096, "C": 13824}),
        Shape("LLaMA-30B", {"rows": 4096, "C": 17920}),
    ),
    BF16,
)


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return normal(shape["rows"], shape["C"], seed=seed, dtype=dtype, device=device)


def _compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Call]:
    def make() -> Call:
        fast = eager.compiled(function)
        return lambda: fast(*args)

    return make


def _norm(residual: bool) -> Callable[..., Job]:
    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        x = _rows(shape, dtype, device, 0)
        stream = _rows(shape, dtype, device, 1) if residual else None
        weight = normal(shape["C"], seed=2, dtype=dtype, device=device)

        def call() -> tuple[Tensor, ...]:
            return qk.rms_norm_quantize(x, weight, EPS, 8, residual=stream)

        def plain() -> tuple[Tensor, ...]:
            return _plain_norm(x, weight, stream)

        name = (
            "x + residual, F.rms_norm, eager quantize" if residual else "F.rms_norm, eager quantize"
        )
        others = {"torch.compile of the eager form": _compiled(_plain_norm, x, weight, stream)}
        return Job(call, {name: plain}, same_bits(call), 2e-2, others)

    return build


def _plain_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    total = x if residual is None else x + residual
    return (*eager.rms_norm_quantize(total, weight, EPS, 8), total)


def _norm_cost(residual: bool) -> Callable[[Shape, torch.dtype], Cost]:
    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        values, tensors = shape["rows"] * shape["C"], 3 if residual else 1
        traffic = values * (tensors * nbytes(dtype) + 1)
        return Cost(traffic + 4 * shape["rows"] + shape["C"] * nbytes(dtype), 9 * values)

    return cost


def _silu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    gate, up = _rows(shape, dtype, device, 0), _rows(shape, dtype, device, 1)

    def call() -> tuple[Tensor, Tensor]:
        return qk.silu_mul_quantize(gate, up, 8)

    return Job(
        call,
        {"F.silu(gate) * up, eager quantize": lambda: eager.silu_mul_quantize(gate, up, 8)},
        same_bits(call),
        2e-2,
        {
            "torch.compile of the eager form": _compiled(eager.silu_mul_quantize, gate, up, 8),
        },
    )


def _silu_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    values = shape["rows"] * shape["C"]
    return Cost(values * (2 * nbytes(dtype) + 1) + 4 * shape["rows"], 15 * values)


GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Gradients are float sums (spec 19): relative norm of the difference from the reference."""


def _training_gate(call: Call, exact: int) -> Callable[[], None]:
    """The first ``exact`` results equal the reference's bit for bit, the gradients but for their
    sums' order.
    """

    def gate() -> None:
        ours, reference = everything(call()), everything(on_reference(call))
        for index, (actual, expected) in enumerate(zip(ours, reference, strict=True)):
            if index < exact:
                assert_same_bits(actual.detach(), expected.detach(), f"output {index}")
                continue
            error = float((actual - expected).norm() / expected.norm())
            if not error <= GRADIENT_TOLERANCE[actual.dtype]:
                raise AssertionError(f"gradient {index - exact} differs by {error:.1e}")

    return gate


def _norm_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x, residual = (_rows(shape, dtype, device, seed).requires_grad_() for seed in (0, 1))
    weight = normal(shape["C"], seed=2, dtype=dtype, device=device).requires_grad_()
    grads = [_rows(shape, dtype, device, seed) for seed in (3, 4)]

    def call() -> tuple[Tensor, ...]:
        y, codes, scale, total = qk.rms_norm_quantize_train(
            x, weight, EPS, 8, residual=residual, values=False
        )
        return codes, scale, *torch.autograd.grad((y, total), (x, residual, weight), grads)

    def plain() -> tuple[Tensor, ...]:
        total = x + residual
        y = F.rms_norm(total, (total.shape[-1],), weight, EPS)
        codes, scale = eager.quantize(y.detach(), 8)
        return codes, scale, *torch.autograd.grad((y, total), (x, residual, weight), grads)

    name = "x + residual, F.rms_norm, eager quantize"
    return Job(call, {name: plain}, _training_gate(call, 2), 2e-2)


def _norm_step_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The forward; the gradients of y and of the sum and the sum in, one gradient out."""
    forward, values = _norm_cost(True)(shape, dtype), shape["rows"] * shape["C"]
    return Cost(forward.bytes + 4 * values * nbytes(dtype), forward.flops + 10 * values)


def _silu_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    gate, up = (_rows(shape, dtype, device, seed).requires_grad_() for seed in (0, 1))
    grad = _rows(shape, dtype, device, 2)

    def call() -> tuple[Tensor, ...]:
        y, codes, scale = qk.silu_mul_quantize_train(gate, up, 8, values=False)
        return codes, scale, *torch.autograd.grad(y, (gate, up), grad)

    def plain() -> tuple[Tensor, ...]:
        y = F.silu(gate) * up
        codes, scale = eager.quantize(y.detach(), 8)
        return codes, scale, *torch.autograd.grad(y, (gate, up), grad)

    name = "F.silu(gate) * up, eager quantize"
    return Job(call, {name: plain}, _training_gate(call, 2), 2e-2)


def _silu_step_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The forward; gate, up and the gradient in, two gradients out."""
    forward, values = _silu_cost(shape, dtype), shape["rows"] * shape["C"]
    return Cost(forward.bytes + 5 * values * nbytes(dtype), forward.flops + 20 * values)


def _first(grid: Grid) -> Grid:
    return Grid(grid.shapes[:1], grid.dtypes)


ENTRIES = (
    Entry("rms_norm_quantize", "8 bit", _norm_cost(False), _norm(False), cuda=GPU_HIDDEN),
    Entry(
        "rms_norm_quantize",
        "8 bit, with residual",
        _norm_cost(True),
        _norm(True),
        HIDDEN,
        GPU_HIDDEN,
    ),
    Entry("silu_mul_quantize", "8 bit", _silu_cost, _silu, INNER, GPU_INNER),
    Entry(
        "rms_norm_quantize_train",
        "8 bit, forward and backward",
        _norm_step_cost,
        _norm_step,
        cuda=_first(GPU_HIDDEN),
    ),
    Entry(
        "silu_mul_quantize_train",
        "8 bit, forward and backward",
        _silu_step_cost,
        _silu_step,
        cuda=_first(GPU_INNER),
    ),
)
