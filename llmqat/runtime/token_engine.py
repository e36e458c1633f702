"""What writes tokens: the interface of the engine and of its stand-in for other families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from llmqat.runtime.sampling import Sampling
from llmqat.runtime.scheduler import Completion, Request, check_request
from llmqat_kernels.errors import InvalidArgument


class TokenEngine(ABC):
    """Continues token sequences.

    Attributes:
        max_slots: sequences that run at one time. max_len: tokens per sequence.
        kv_bits, kv_mode: of the KV cache; 16 is a float one.
        dtype, device: of the activations.
    """

    max_slots: int
    max_len: int
    vocab_size: int
    kv_bits: int
    kv_mode: str
    dtype: torch.dtype
    device: torch.device

    @property
    @abstractmethod
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights by kind."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the whole KV cache."""

    @abstractmethod
    def backends(self) -> dict[str, str]:
        """Which backend runs what."""

    @abstractmethod
    def run(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[list[Completion]]:
        """Run ``requests``, read one by one as there is room; yields those that ended together.

        Args:
            stop_ids: tokens that end a sequence; they stay in it.
            on_token: called with (record, token) for every token chosen.
            on_step: called with the number of tokens chosen in each step.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; more prompts than slots wait for a free one.

        Args:
            prompts: token ids; prompt i is record i, which with the seed decides its random
                numbers.
            max_new_tokens: tokens to add at most; ``max_len`` bounds prompt and continuation
                together.
            sampling: None takes the most likely token each time.
            stop_ids: tokens that end a sequence (they are kept).
            on_token: called with (prompt index, token) as tokens are chosen.

        Returns:
            One completion per prompt, in their order.
        """
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens: {max_new_tokens} must be at least 1")
        requests = [
            Request(index, tuple(prompt), min(len(prompt) + max_new_tokens, self.max_len))
            for index, prompt in enumerate(prompts)
        ]
        for request in requests:  # before any token is computed
            check_request(request, self.max_len, self.vocab_size)
        settings = Sampling(greedy=True) if sampling is None else sampling
        steps = self.run(requests, settings, stop_ids=stop_ids, on_token=on_token)
        return sorted(
            (done for step in steps for done in step),
            key=lambda completion: completion.request.record,
        )
