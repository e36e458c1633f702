"""What writes tokens: the interface of the engine and of its stand-in for other families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmqat.runtime.sampling import Sampling
from llmqat.runtime.scheduler import Completion, Request, check_request
from llmqat_kernels.errors import InvalidArgument, InvalidArgumentType

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; more prompts than slots wait for a free one.

        Args:
            prompts: lists of token ids, or an integer tensor [n, T]; prompt i is record i, which
                with the seed decides its random numbers.
            max_new_tokens: tokens to add at most; ``max_len`` bounds prompt and continuation
                together.
            sampling: None takes the most likely token each time.
            stop_ids: tokens that end a sequence (they are kept).
            on_token: called with (prompt index, token) as tokens are chosen.

        Returns:
            One completion per prompt, in their order.

        Raises:
            InvalidArgumentType: prompts or a sampling of another type. InvalidArgument: a prompt
                that is empty or too long, or an id outside the vocabulary.
        """
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens: {max_new_tokens} must be at least 1")
        requests = [
            Request(index, prompt, min(len(prompt) + max_new_tokens, self.max_len))
            for index, prompt in enumerate(_token_ids(prompts))
        ]
        for request in requests:  # before any token is computed
            check_request(request, self.max_len, self.vocab_size)
        settings = Sampling(greedy=True) if sampling is None else sampling
        steps = self.run(requests, settings, stop_ids=stop_ids, on_token=on_token)
        return sorted(
            (done for step in steps for done in step),
            key=lambda completion: completion.request.record,
        )


def _token_ids(prompts: Any) -> list[tuple[int, ...]]:
    """The ids of every prompt; whether they are in the vocabulary is checked later.

    Raises:
        InvalidArgumentType: not a list of lists, nor an integer tensor [n, T].
    """
    wanted = "prompts: expected a list of lists of token ids"
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype not in ID_DTYPES:
            raise InvalidArgumentType(
                f"{wanted} or an integer tensor [n, T], got {prompts.dtype} {tuple(prompts.shape)}"
            )
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidArgumentType(f"{wanted}, got {type(prompts).__name__}")
    ids: list[tuple[int, ...]] = []
    for prompt in prompts:
        if isinstance(prompt, (str, bytes, Mapping, Tensor)) or not isinstance(prompt, Iterable):
            raise InvalidArgumentType(f"{wanted}, got one of {type(prompt).__name__}")
        ids.append(tuple(prompt))
    return ids
