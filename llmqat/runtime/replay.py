"""The forward pass recorded once and replayed without Python between its operators.

At batch 1 the operators of a small model take microseconds each, and calling them from Python costs
as much again: replaying saved a fifth of a step (SmolLM2-135M, one thread). TorchScript does it:
the recording is a list of the same operator calls, run by its interpreter without optimization
passes, so the bits are the same. PyTorch has deprecated recording (not running) such graphs without
another interpreter to move to; where a version refuses, the engine runs from Python and says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("llmqat")

Pass = Callable[[Tensor, Tensor, Tensor], Tensor]


def record(forward: Pass, examples: tuple[Tensor, Tensor, Tensor]) -> Pass:
    """``forward`` as a replayable graph; it must be a fixed sequence of operators for every number
    of rows.

    ``forward`` runs once on ``examples``, side effects included. If this version of PyTorch cannot
    record it, ``forward`` itself comes back and a warning says so.
    """

    def run(tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return forward(tokens, slots, positions)  # the recorder wants a plain function

    try:
        with warnings.catch_warnings(), torch.jit.optimized_execution(False):
            warnings.simplefilter("ignore")
            graph = torch.jit.trace(run, examples, check_trace=False)
    except (AttributeError, RuntimeError) as error:
        logger.warning(
            "the engine runs from Python, which is slower: %s", str(error).splitlines()[0]
        )
        return forward

    def replay(tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):
            return graph(tokens, slots, positions)  # type: ignore[no-any-return]

    return replay
