"""A whole training step as one CUDA graph, by the code of the benchmark."""

from __future__ import annotations

import torch

from benchmarks import cuda, qat_models
from tests.device.registry import flow

SIZES = qat_models.Model(64, 96, 1, 1, 1, 128, 8)
BEFORE = 2
"""Steps that `cuda.captured` launches before it captures; it replays one at its end."""
STEPS = 5
NEAR = 2e-3
"""Relative: gradients of attention are summed in another order in every run on a GPU."""


@flow("plain", candidate="plain")
@flow("prepared", candidate="llmqat")
@flow("fused", candidate="llmqat fused")
@flow("composed gradients", candidate=qat_models.COMPOSED_GRADIENTS)
def step_graph(place, candidate):
    """Replays of a captured step train as launched steps do: weights are quantized anew in each."""
    with place.device():
        launched = [float(step.run()) for step in [learning_step(candidate)] for _ in range(STEPS)]
        step, loss = learning_step(candidate), []

        def body():
            loss[:] = [step.run_whole()]

        replay, how = cuda.captured(body)
        assert how == "graph", "the step waits for the device"
        replayed = [float(loss[0])]
        for _ in range(STEPS - BEFORE - 1):
            replay()
            replayed.append(float(loss[0]))
    near = 1e-6 if place.exact else NEAR
    pairs = list(zip(replayed, launched[BEFORE:], strict=True))
    assert all(abs(a / b - 1) < near for a, b in pairs), pairs
    assert replayed[-1] < replayed[0], pairs


def learning_step(candidate):
    """The benchmark's step, with a rate at which something is learned."""
    device = torch.device("cuda")
    teacher = SIZES.build(device, seed=2).eval().requires_grad_(False)
    step = qat_models.Step(SIZES, qat_models.candidates()[candidate], teacher, device)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    step.checkpointing(True)
    return step
