"""How the next token is chosen: the settings, and the kernel bound once (spec 15, 16)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmqat.errors import ConfigError
from llmqat.runtime.transfer import upload
from llmqat_kernels.dispatch import current_backend, resolve
from llmqat_kernels.errors import InvalidArgumentType

NO_TOKEN = -1
"""What sampling gives for a row with NaN or without any finite logit."""


@dataclass(frozen=True)
class Sampling:
    """The settings of one run.

    Args:
        seed: with a sequence's record id and the step it decides every random number.
        temperature: > 0, divides the logits.
        top_k: 0 samples from the full softmax, k > 0 from the k largest logits.
        greedy: every token is the most likely one; temperature and top_k are not used.

    Raises:
        ConfigError: a value out of range.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not 0 <= self.seed < 2**63
        ):
            raise ConfigError(f"seed: {self.seed!r} is not an integer of 0..2^63-1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"temperature: {self.temperature} must be positive; use greedy for the best token"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k: {self.top_k} must be 0 (off) or positive")


class Sampler:
    """Chooses one token per row of logits with ``llmqat_kernels.sample``'s kernel for
    ``device``.

    Raises:
        InvalidArgumentType: `sampling` is no :class:`Sampling`.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str) -> None:
        if not isinstance(sampling, Sampling):
            raise InvalidArgumentType(f"sampling: expected Sampling, got {type(sampling).__name__}")
        self.sampling = sampling
        self.device = torch.device(device)
        self.kernel = resolve("sample", self.device.type, current_backend()).kernel

    def __call__(
        self, logits: Tensor, records: Sequence[int], steps: Sequence[int], greedy: Sequence[bool]
    ) -> list[int]:
        """The next token of each row of ``logits`` [n, V]; :data:`NO_TOKEN` where there is none.

        ``records`` and ``steps`` [n] key the random numbers; rows with ``greedy`` take the largest
        logit.
        """
        return self.draw(logits, records, steps, greedy).tolist()  # type: ignore[no-any-return]

    def draw(
        self, logits: Tensor, records: Sequence[int], steps: Sequence[int], greedy: Sequence[bool]
    ) -> Tensor:
        """As calling it, but int64 [n] on the device."""
        settings = self.sampling
        flags = [True] * len(greedy) if settings.greedy else greedy
        return self.kernel(  # type: ignore[no-any-return]
            logits,
            upload(records, torch.int64, self.device),
            upload(steps, torch.int64, self.device),
            upload(flags, torch.bool, self.device),
            settings.seed,
            settings.temperature,
            settings.top_k,
        )
