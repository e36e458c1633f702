"""Entries above the head: the distillation loss (forward and backward) and sampling.

Floors: the loss reads both heads and both hidden states and writes the student's two gradients;
its four products have 8nKV operations. Sampling reads the logits once and makes one comparison a
value (groups of values that cannot win draw no noise).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entry import (
    Call,
    Cost,
    Entry,
    Job,
    Shape,
    everything,
    nbytes,
    normal,
    on_reference,
    same_bits,
)

FP32 = (torch.float32,)
LOSSES = (
    Shape("SmolLM2", {"n": 32, "K": 576, "V": 49152}),
    Shape("SmolLM2", {"n": 256, "K": 576, "V": 49152}),
)
LOGITS = (
    Shape("SmolLM2", {"n": 1, "V": 49152}),
    Shape("SmolLM2", {"n": 64, "V": 49152}),
    Shape("LLaMA-7B", {"n": 8, "V": 32000}),
)


def _loss(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    n, k, v = shape["n"], shape["K"], shape["V"]

    def make(*size: int, seed: int) -> Tensor:
        return normal(*size, seed=seed, dtype=dtype, device=device)

    student, teacher = make(n, k, seed=0).requires_grad_(), make(n, k, seed=1)
    # Heads of this size give logits with a standard deviation near 2, as a trained model's.
    student_head = (make(v, k, seed=2) * 0.08).requires_grad_()
    teacher_head = make(v, k, seed=3) * 0.08

    def step(loss: Callable[..., Tensor]) -> Call:
        def run() -> tuple[Tensor, ...]:
            y = loss(student, student_head, teacher, teacher_head)
            return y, *torch.autograd.grad(y, (student, student_head))

        return run

    call = step(qk.distillation_loss)
    baselines = {
        "F.cross_entropy on probabilities": step(eager.distillation_loss),
        "F.kl_div": step(eager.kl_loss),
    }

    def gate() -> None:
        names = ("loss", "gradient of hidden", "gradient of head")
        pairs = zip(everything(call()), everything(on_reference(call)), strict=True)
        for name, (actual, reference) in zip(names, pairs, strict=True):
            # Float sums over the vocabulary: equal but for their order.
            error = _relative(actual, reference)
            if not error <= 1e-5:
                raise AssertionError(f"{name} differs from the reference by {error:.1e}")

    return Job(call, baselines, gate, 1e-4)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def _loss_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    n, k, v = shape["n"], shape["K"], shape["V"]
    return Cost(3 * (v * k + n * k) * nbytes(dtype), 8 * n * k * v)


def _sample(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    logits = normal(shape["n"], shape["V"], seed=0, dtype=dtype, device=device) * 2
    record = torch.arange(shape["n"], device=device)
    step = torch.full_like(record, 5)

    def call() -> Tensor:
        return qk.sample(logits, record, step, seed=0)

    def multinomial() -> Any:
        return torch.multinomial(logits.softmax(-1), 1)

    def exponential() -> Any:
        probabilities = logits.softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    baselines = {
        "softmax + torch.multinomial": multinomial,
        "softmax / exponential, argmax": exponential,
    }
    # Different random numbers on purpose: tests/kernels checks the distribution.
    return Job(call, baselines, same_bits(call), None)


def _sample_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    values = shape["n"] * shape["V"]
    return Cost(values * nbytes(dtype) + 8 * 3 * shape["n"], values)


ENTRIES = (
    Entry("distillation_loss", "forward and backward", LOSSES, FP32, _loss_cost, _loss),
    Entry("sample", "full softmax", LOGITS, FP32, _sample_cost, _sample),
)
