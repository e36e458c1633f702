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
from benchmarks import eager, optional
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

FP32 = (torch.float32,)
LOSSES = (
    Shape("SmolLM2", {"n": 32, "K": 576, "V": 49152}),
    Shape("SmolLM2", {"n": 256, "K": 576, "V": 49152}),
)
GPU_LOSSES = Grid(
    (
        Shape("LLaMA-7B", {"n": 4096, "K": 4096, "V": 32000}),
        Shape("SmolLM2", {"n": 2048, "K": 576, "V": 49152}),
    ),
    (torch.bfloat16,),
)
TOP_K = 128
GPU_LOGITS = Grid(
    (Shape("LLaMA-7B", {"n": 64, "V": 32000}), Shape("SmolLM2", {"n": 256, "V": 49152})), FP32
)
GPU_LOSS_LOGITS = Grid((Shape("LLaMA-7B", {"n": 2048, "V": 32000}),), (torch.bfloat16,))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Float sums over the vocabulary: equal but for their order, and in bf16 for the rounding of logits
and gradients whose sums were ordered otherwise."""
NAMES = ("loss", "gradient of hidden", "gradient of head")
LOSS_AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
LOGITS = (
    Shape("SmolLM2", {"n": 1, "V": 49152}),
    Shape("SmolLM2", {"n": 64, "V": 49152}),
    Shape("LLaMA-7B", {"n": 8, "V": 32000}),
)


def _heads(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """student hidden and head (with gradients), teacher hidden and head."""
    n, k, v = shape["n"], shape["K"], shape["V"]

    def make(*size: int, seed: int) -> Tensor:
        return normal(*size, seed=seed, dtype=dtype, device=device)

    # Heads of this size give logits with a standard deviation near 2, as a trained model's.
    size = 2 * k**-0.5
    student_head = (make(v, k, seed=2) * size).requires_grad_()
    return (
        make(n, k, seed=0).requires_grad_(),
        student_head,
        make(n, k, seed=1),
        make(v, k, seed=3) * size,
    )


def _step(loss: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Call:
    def run() -> tuple[Tensor, ...]:
        y = loss()
        return y, *torch.autograd.grad(y, inputs)

    return run


def _gate(call: Call, names: tuple[str, ...], tolerance: float) -> Callable[[], None]:
    def gate() -> None:
        pairs = zip(everything(call()), everything(on_reference(call)), strict=True)
        for name, (actual, reference) in zip(names, pairs, strict=True):
            error = _relative(actual, reference)
            if not error <= tolerance:
                raise AssertionError(f"{name} differs from the reference by {error:.1e}")

    return gate


def _loss(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    tensors = _heads(shape, dtype, device)
    student, student_head, _, _ = tensors
    inputs = (student, student_head)
    call = _step(lambda: qk.distillation_loss(*tensors), inputs)

    def compiled() -> Call:
        # Not max-autotune: that compiles and times candidates for every product, which at these
        # sizes can take most of a run's time, and no figure of README reads this row.
        fast = eager.compiled(eager.distillation_loss, mode=None)
        return _step(lambda: fast(*tensors), inputs)

    baselines = {
        "F.cross_entropy on probabilities": _step(
            lambda: eager.distillation_loss(*tensors), inputs
        ),
        "F.kl_div": _step(lambda: eager.kl_loss(*tensors), inputs),
    }
    others = {
        "torch.compile of F.cross_entropy": compiled,
        "Liger with the teacher's head": lambda: optional.liger_distillation(*tensors),
    }
    gate = _gate(call, NAMES, TOLERANCE[dtype])
    return Job(call, baselines, gate, LOSS_AGREEMENT[dtype], others)


def _top_k(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    student, head, teacher, teacher_head = _heads(shape, dtype, device)
    with torch.no_grad():
        logits = (teacher @ teacher_head.T).float()
        stored = logits.softmax(-1).topk(min(TOP_K, shape["V"] // 2))
    probabilities, tokens = stored.values.to(dtype), stored.indices
    inputs = (student, head)
    call = _step(lambda: qk.distillation_loss_top_k(student, head, probabilities, tokens), inputs)
    plain = _step(lambda: eager.top_k_loss(student, head, probabilities, tokens), inputs)
    gate = _gate(call, NAMES, TOLERANCE[dtype])
    return Job(call, {"eager log_softmax + gather": plain}, gate, LOSS_AGREEMENT[dtype])


def _top_k_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    n, k, v = shape["n"], shape["K"], shape["V"]
    stored = n * min(TOP_K, v // 2) * (nbytes(dtype) + 8)
    return Cost(2 * (v * k + n * k) * nbytes(dtype) + stored, 6 * n * k * v)


def _loss_logits(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
    size = (shape["n"], shape["V"])
    student, teacher = (normal(*size, seed=s, dtype=dtype, device=device) * 2 for s in (0, 1))
    student.requires_grad_()
    call = _step(lambda: qk.distillation_loss_logits(student, teacher), (student,))

    def compiled() -> Call:
        fast = eager.compiled(eager.logits_loss)
        return _step(lambda: fast(student, teacher), (student,))

    plain = _step(lambda: eager.logits_loss(student, teacher), (student,))
    return Job(
        call,
        {"F.cross_entropy on probabilities": plain},
        _gate(call, ("loss", "gradient"), TOLERANCE[dtype]),
        LOSS_AGREEMENT[dtype],
        {"torch.compile of F.cross_entropy": compiled},
    )


def _loss_logits_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Both logits in, the gradient out; two exponentials (15 operations) and a few sums a value."""
    values = shape["n"] * shape["V"]
    return Cost(3 * values * nbytes(dtype), 40 * values)


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


STEP = "forward and backward"
ENTRIES = (
    Entry("distillation_loss", STEP, _loss_cost, _loss, Grid(LOSSES, FP32), GPU_LOSSES),
    Entry("distillation_loss_top_k", STEP, _top_k_cost, _top_k, cuda=GPU_LOSSES),
    Entry("distillation_loss_logits", STEP, _loss_logits_cost, _loss_logits, cuda=GPU_LOSS_LOGITS),
    Entry("sample", "full softmax", _sample_cost, _sample, Grid(LOGITS, FP32), GPU_LOGITS),
)
