"""Continuous slots: a finished sequence leaves at once and the next one takes its place.

Every random number of a sequence is keyed by (seed, record, step) and a row's logits do not depend
on the other rows, so the tokens of a record are the same whatever the slots, the order or a
restart.

With a lag of one step (CUDA) the next step is launched before the tokens of the last one are read.
The host knows beforehand which sequences reach their length; one that turns out to have ended on
its own has a row in vain, whose result is dropped: lengths alone say what is visible in a slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llmqat.runtime.graphs import Row
from llmqat.runtime.sampling import NO_TOKEN, Sampler, Sampling
from llmqat.runtime.transfer import download
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


class Active:
    """A sequence in a slot.

    ``planned`` counts its tokens and those under way; ``source`` is where its fresh token lies on
    the device when the static step is loaded next (``Row``), -1 if the host has it.
    """

    __slots__ = ("limit", "planned", "reason", "request", "slot", "source", "tokens")

    def __init__(self, request: Request, slot: int) -> None:
        self.request, self.slot, self.limit = request, slot, request.max_len
        self.tokens = list(request.prompt)
        self.planned = len(self.tokens)
        self.source = -1
        self.reason: str | None = None

    @property
    def greedy(self) -> bool:
        """Whether its next token is the most likely one."""
        return self.planned < len(self.request.prompt) + self.request.n_greedy

    def choose(self, token: int, stop_ids: frozenset[int]) -> str | None:
        """Add the chosen token; why the sequence ends, or None."""
        if token == NO_TOKEN:
            return "error"
        self.tokens.append(token)
        if token in stop_ids:
            return "eos"
        return "length" if len(self.tokens) >= self.limit else None

    def as_row(self) -> Row:
        """For the static step."""
        request = self.request
        return Row(
            self.slot,
            request.record,
            self.planned - 1,
            len(request.prompt) + request.n_greedy,
            request.prompt[0] if self.source < 0 else -1,
            self.source,
        )


class _Launch(NamedTuple):
    """Tokens under way: of which sequences, and what waits for them."""

    rows: list[Active]
    read: Callable[[], list[int]]


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
        InvalidArgumentType: a sampling of another type.
        InvalidArgument: a request whose prompt is empty, holds a token outside the vocabulary, or
            does not fit its ``max_len`` or the engine's; or the engine was used for something else
            before this run ended.
    """
    run = _Run(engine, requests, Sampler(sampling, engine.device), frozenset(stop_ids))
    under_way: deque[list[_Launch]] = deque()
    while True:
        ended = run.admit()
        if run.rows or run.new:
            under_way.append(run.launch())
        elif not under_way:
            if ended:
                yield ended
            return
        while len(under_way) > (engine.plan.lag if run.rows else 0):
            for launch in under_way.popleft():
                ended += run.resolve(launch, on_token, on_step)
        if ended:
            yield ended


class _Run:
    """One call of :func:`run_requests`. ``rows`` are the sequences of the next static step, ``new``
    those with a prompt to prefill.
    """

    def __init__(
        self, engine: Engine, requests: Iterable[Request], sampler: Sampler, stops: frozenset[int]
    ) -> None:
        self.rows: list[Active] = []  # never changed in place: a new list is loaded again
        self.new: list[Active] = []
        self._engine, self._sampler, self._stops = engine, sampler, stops
        self._mark = engine.user = object()
        self._waiting = iter(requests)
        self._free = list(range(engine.max_slots - 1, -1, -1))
        self._loaded = self.rows
        self._fresh: list[Tensor] = []  # chosen by prefills since the last load
        engine.static.configure(sampler)

    @contextmanager
    def _using(self) -> Iterator[Engine]:
        """The engine, for a change of its slots.

        Raises:
            InvalidArgument: another run or call has changed them since.
        """
        if self._engine.user is not self._mark:
            raise InvalidArgument(
                "run: the engine was used for something else before this run ended; finish one run"
                " first, or give each an engine of its own"
            )
        yield self._engine
        self._engine.user = self._mark

    def admit(self) -> list[Completion]:
        """Give free slots to waiting requests; those that need no token end at once."""
        ended: list[Completion] = []
        while self._free and (request := next(self._waiting, None)) is not None:
            check_request(request, self._engine.max_len, self._engine.vocab_size)
            if len(request.prompt) == request.max_len:
                ended.append(Completion(request, list(request.prompt), "length"))
                continue
            slot = self._free.pop()
            with self._using() as engine:
                engine.reset((slot,))
            if len(request.prompt) == 1:
                self.rows = [*self.rows, Active(request, slot)]
            else:
                self.new.append(Active(request, slot))
        return ended

    def launch(self) -> list[_Launch]:
        """One more token for every sequence."""
        launches = []
        if self.rows:
            launches.append(self._step())
        if self.new:  # after the step, whose load would forget their fresh tokens
            launches.append(self._prefill())
            self.rows = [*self.rows, *(row for row in self.new if row.planned < row.limit)]
            self.new = []
        return launches

    def _under_way(self, rows: list[Active], chosen: Tensor) -> _Launch:
        """Count the tokens ``chosen``; a sequence that is full with them leaves its slot."""
        full = False
        for row in rows:
            row.planned += 1
            if row.planned >= row.limit:
                self._free.append(row.slot)
                full = True
        if full:
            self.rows = [row for row in self.rows if row.planned < row.limit]
        return _Launch(rows, download(chosen) if self._engine.plan.lag else chosen.tolist)

    @torch.inference_mode()
    def _prefill(self) -> _Launch:
        """The token after each new prompt; logits are formed only where a row draws from them."""
        rows = self.new
        requests = [row.request for row in rows]
        with self._using() as engine:
            hidden = engine.append([row.slot for row in rows], [r.prompt for r in requests])
        greedy = [self._sampler.sampling.greedy or row.greedy for row in rows]
        if engine.screens and all(greedy):
            chosen = engine.forward.greedy(hidden)
        else:
            records, steps = [r.record for r in requests], [row.planned for row in rows]
            chosen = self._sampler.draw(engine.forward.logits(hidden), records, steps, greedy)
        first = engine.static.width + sum(map(len, self._fresh))
        self._fresh.append(chosen)
        for i, row in enumerate(rows):
            row.source = first + i
        return self._under_way(rows, chosen)

    def _step(self) -> _Launch:
        """One static step of ``rows``."""
        with self._using() as engine:
            static, rows = engine.static, self.rows
        if self._loaded is not rows:
            static.load([row.as_row() for row in rows], self._fresh)
            for i, row in enumerate(rows):
                row.source = i
            self._loaded, self._fresh = rows, []
        engine.decoded(row.slot for row in rows)
        return self._under_way(rows, static.step())

    def resolve(
        self,
        launch: _Launch,
        on_token: Callable[[int, int], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> list[Completion]:
        """Read the tokens of ``launch``: the sequences that ended with them."""
        ended: list[Completion] = []
        pairs = zip(launch.rows, launch.read(), strict=True)
        live = [(row, token) for row, token in pairs if row.reason is None]
        if on_step is not None and live:
            on_step(len(live))
        for row, token in live:
            row.reason = row.choose(token, self._stops)
            if on_token is not None and token != NO_TOKEN:
                on_token(row.request.record, token)
            if row.reason is not None:
                self._leave(row)
                ended.append(Completion(row.request, row.tokens, row.reason))
        return ended

    def _leave(self, row: Active) -> None:
        """Free the slot of a sequence that has ended, unless it was known to be full."""
        if row.planned >= row.limit:
            return
        self.rows = [other for other in self.rows if other is not row]
        self._free.append(row.slot)
        seen = len(row.tokens) - int(row.reason != "error")  # the last token was never an input
        with self._using() as engine:
            engine.assume_length(row.slot, seen)


def check_request(request: Request, max_len: int, vocab_size: int) -> None:
    """InvalidArgument: an empty prompt, a token that is none, or a number out of range."""
    prompt = request.prompt
    if not 0 <= request.record < 2**63 or request.n_greedy < 0:
        raise InvalidArgument(
            f"requests: record {request.record} must lie in 0..2^63-1, and its n_greedy"
            f" {request.n_greedy} must be at least 0"
        )
    if not prompt:
        raise InvalidArgument(f"prompts: prompt {request.record} is empty; give at least one token")
    if not len(prompt) <= request.max_len <= max_len:
        raise InvalidArgument(
            f"prompts: prompt {request.record} has {len(prompt)} tokens, its limit is"
            f" {request.max_len} and the engine's max_len {max_len}"
        )
    for token in prompt:
        if not isinstance(token, Integral) or not 0 <= token < vocab_size:
            raise InvalidArgument(
                f"prompts: ids must be integers of 0..{vocab_size - 1}, prompt {request.record} has"
                f" {token!r}"
            )
