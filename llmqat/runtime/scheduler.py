"""Continuous slots: a finished sequence leaves at once and the next one takes its place in the same
step.

Every random number of a sequence is keyed by (seed, record, step) and a row's logits do not depend
on the other rows, so the tokens of a record are the same whatever the slots, the order or a
restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmqat.runtime.sampling import NO_TOKEN, Sampler, Sampling
from llmqat_kernels.errors import InvalidArgument

if TYPE_CHECKING:
    from llmqat.runtime.engine import Engine


@dataclass(frozen=True)
class Request:
    """One sequence to make.

    Args:
        record: keys its random numbers; >= 0.
        prompt: the ids it starts with, at least one.
        max_len: tokens of prompt and continuation together.
        n_greedy: how many tokens after the prompt are the most likely ones, before sampling begins.
    """

    record: int
    prompt: tuple[int, ...]
    max_len: int
    n_greedy: int = 0


@dataclass(frozen=True)
class Completion:
    """A finished sequence: prompt and continuation, and why it ended (``eos``, ``length`` or
    ``error``).

    ``error`` means that the logits held NaN or nothing finite: no token could be chosen.
    """

    request: Request
    tokens: list[int]
    finish_reason: str

    @property
    def new_tokens(self) -> list[int]:
        """The continuation alone."""
        return self.tokens[len(self.request.prompt) :]


@dataclass
class _Active:
    request: Request
    tokens: list[int]
    fresh: list[int] = field(default_factory=list)  # tokens the engine has not seen yet

    def choose(self, token: int, stop_ids: frozenset[int]) -> str | None:
        """Add the chosen token; why the sequence ends, or None."""
        if token == NO_TOKEN:
            return "error"
        self.tokens.append(token)
        self.fresh = [token]
        if token in stop_ids:
            return "eos"
        return "length" if len(self.tokens) >= self.request.max_len else None


def run_requests(
    engine: Engine,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int, int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[list[Completion]]:
    """Run ``requests`` through the engine's slots; yields, step by step, those that ended together.

    Args:
        requests: read one by one as slots become free, so it may be long or lazy.
        stop_ids: tokens that end a sequence; they stay in it.
        on_token: called with (record, token) for every token chosen.
        on_step: called with the number of tokens chosen in each step.

    Raises:
        InvalidArgument: a request whose prompt is empty or does not fit its ``max_len`` or the
            engine's.
    """
    stops = frozenset(stop_ids)
    sampler = Sampler(sampling, engine.device)
    waiting = iter(requests)
    free = list(range(engine.max_slots - 1, -1, -1))
    active: dict[int, _Active] = {}
    while True:
        ended: list[Completion] = []
        while free and (request := next(waiting, None)) is not None:
            _check(request, engine.max_len)
            if len(request.prompt) == request.max_len:
                ended.append(Completion(request, list(request.prompt), "length"))
                continue
            slot = free.pop()
            engine.reset((slot,))
            active[slot] = _Active(request, list(request.prompt), list(request.prompt))
        if not active:
            if ended:
                yield ended
            return
        slots = list(active)
        rows = [active[slot] for slot in slots]
        chosen = _step(engine, sampler, slots, rows)
        if on_step is not None:
            on_step(len(chosen))
        for slot, row, token in zip(slots, rows, chosen, strict=True):
            reason = row.choose(token, stops)
            if on_token is not None and token != NO_TOKEN:
                on_token(row.request.record, token)
            if reason is not None:
                del active[slot]
                free.append(slot)
                ended.append(Completion(row.request, row.tokens, reason))
        if ended:
            yield ended


def _step(engine: Engine, sampler: Sampler, slots: list[int], rows: Sequence[_Active]) -> list[int]:
    """The next token of each row; the logits are formed only where a row draws from them."""
    fresh = [row.fresh for row in rows]
    greedy = [
        sampler.sampling.greedy or len(row.tokens) - len(row.request.prompt) < row.request.n_greedy
        for row in rows
    ]
    if engine.screens and all(greedy):
        return engine.extend_greedy(slots, fresh)
    records, steps = [row.request.record for row in rows], [len(row.tokens) for row in rows]
    return sampler(engine.extend(slots, fresh), records, steps, greedy)


def _check(request: Request, max_len: int) -> None:
    if not request.prompt:
        raise InvalidArgument(f"prompts: prompt {request.record} is empty; give at least one token")
    if not len(request.prompt) <= request.max_len <= max_len:
        raise InvalidArgument(
            f"prompts: prompt {request.record} has {len(request.prompt)} tokens, its limit is"
            f" {request.max_len} and the engine's max_len {max_len}"
        )
