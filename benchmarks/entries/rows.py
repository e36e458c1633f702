"""Entries of the row ops: quantize, dequantize, fake_quantize (forward and backward), the same in
channel groups, int4 packing.

Floors: no arithmetic but the traffic counts for packing; a row op has a handful of fp32 operations
a value (absolute value and maximum, multiply, clamp, round: at least 4; dequantize: 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager, optional
from benchmarks.entry import Call, Cost, Entry, Grid, Job, Shape, nbytes, normal, same_bits
from llmqat_kernels.spec import channels
from llmqat_kernels.spec import quantize as spec

FLOATS = (torch.float32, torch.bfloat16)
BF16 = (torch.bfloat16,)
TOKENS = Grid(
    (Shape("SmolLM2", {"rows": 1024, "C": 576}), Shape("LLaMA-7B", {"rows": 512, "C": 4096})),
    FLOATS,
)
WEIGHTS = Grid(
    (Shape("SmolLM2", {"rows": 1536, "C": 576}), Shape("LLaMA-7B", {"rows": 4096, "C": 4096})),
    FLOATS,
)
GPU_TOKENS = Grid(
    (
        Shape("LLaMA-7B", {"rows": 2048, "C": 4096}),
        Shape("LLaMA-30B", {"rows": 4096, "C": 6656}),
        Shape("LLaMA-7B", {"rows": 2048, "C": 11008}),
    ),
    BF16,
)
GPU_WEIGHTS = Grid(
    (
        Shape("LLaMA-7B", {"rows": 4096, "C": 4096}),
        Shape("LLaMA-7B", {"rows": 11008, "C": 4096}),
        Shape("LLaMA-13B", {"rows": 5120, "C": 13824}),
    ),
    BF16,
)
CODES = (torch.int8,)


def _values(shape: Shape) -> int:
    return shape["rows"] * shape["C"]


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return normal(shape["rows"], shape["C"], seed=seed, dtype=dtype, device=device)


def _compiled(function: Callable[..., object], *args: object) -> Callable[[], Call]:
    """The maker of torch.compile's version of a call, for Job.optional."""

    def make() -> Call:
        fast = eager.compiled(function)
        return lambda: fast(*args)

    return make


def _quantize(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x = _rows(shape, dtype, device)

    def call() -> tuple[Tensor, Tensor]:
        return qk.quantize(x, 8)

    return Job(
        call,
        {"eager": lambda: eager.quantize(x, 8)},
        same_bits(call),
        2e-2,
        {"torch.compile of the spec": _compiled(spec.quantize, x, 8)},
    )


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


def _agreement(dtype: torch.dtype) -> float:
    # Eager bf16 rounds its quotient to bf16 and lands on the other side of a tie now and then.
    return 1e-2 if dtype == torch.float32 else 0.2


def _fake_quantize(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    """The forward pass alone, against the same quantizer in eager operations."""
    x = _rows(shape, dtype, device)

    def call() -> Tensor:
        return qk.fake_quantize(x, 4)

    return Job(
        call,
        {
            "eager": lambda: eager.fake_quantize(x, 4),
            "eager, as published": lambda: eager.PublishedFakeQuantize.apply(x, 4),
            "eager, the paper's": lambda: eager.PaperFakeQuantize.apply(x, 4),
        },
        same_bits(call),
        _agreement(dtype),
        {
            "torch.compile of the spec": _compiled(spec.fake_quantize, x, 4),
            "torchao": lambda: optional.torchao_fake_quantize(x, 4),
        },
    )


def _fake_quantize_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x, grad = _rows(shape, dtype, device).requires_grad_(), _rows(shape, dtype, device, 1)

    def step(function: Callable[[Tensor], Tensor]) -> Call:
        return lambda: _step(function, x, grad)

    def compiled() -> Call:
        return step(eager.compiled(lambda t: t + (spec.fake_quantize(t.detach(), 4) - t).detach()))

    def torchao() -> Call:
        module = optional.torchao_fake_quantizer(4)
        return step(module)

    call = step(lambda t: qk.fake_quantize(t, 4))
    baselines = {
        "eager": step(lambda t: eager.fake_quantize(t, 4)),
        "eager, as published": step(lambda t: eager.PublishedFakeQuantize.apply(t, 4)),
        "eager, the paper's": step(lambda t: eager.PaperFakeQuantize.apply(t, 4)),
    }
    if dtype == torch.float32:
        baselines["torch.fake_quantize_per_channel_affine"] = step(
            lambda t: eager.fake_quantize_affine(t, 4)
        )
    others = {"torch.compile of the spec": compiled, "torchao": torchao}
    return Job(call, baselines, same_bits(call), _agreement(dtype), others)


def _fake_quantize_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    # The straight-through gradient is the incoming one: the backward pass has no floor.
    return Cost(_values(shape) * 2 * nbytes(dtype), 5 * _values(shape))


def _channels(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    x = _rows(shape, dtype, device)

    def call() -> Tensor:
        return qk.fake_quantize_channels(x, 4, group_size=4)

    return Job(
        call,
        {"eager": lambda: eager.fake_quantize_channels(x, 4, 4)},
        same_bits(call),
        _agreement(dtype),
        {"torch.compile of the spec": _compiled(channels.fake_quantize_channels, x, 4, 4)},
    )


def _channels_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    # The scales are known only after the last row: x is read twice.
    return Cost(_values(shape) * 3 * nbytes(dtype), 5 * _values(shape))


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
    Entry("quantize", "8 bit", _quantize_cost, _quantize, TOKENS, GPU_TOKENS),
    Entry("dequantize", "8 bit", _dequantize_cost, _dequantize, TOKENS, GPU_TOKENS),
    Entry("fake_quantize", "4 bit, forward", _fake_quantize_cost, _fake_quantize, cuda=GPU_WEIGHTS),
    Entry(
        "fake_quantize",
        "4 bit, forward and backward",
        _fake_quantize_cost,
        _fake_quantize_step,
        WEIGHTS,
        GPU_WEIGHTS,
    ),
    Entry("fake_quantize_channels", "4 bit", _channels_cost, _channels, TOKENS, GPU_TOKENS),
    Entry("pack_int4", "", _pack_cost, _pack, Grid(WEIGHTS.shapes, CODES)),
    Entry("unpack_int4", "", _pack_cost, _unpack, Grid(WEIGHTS.shapes, CODES)),
)
