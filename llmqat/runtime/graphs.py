"""One decode step that needs nothing of the host: what a CUDA graph can replay.

Each row of the step is a sequence with one fresh token. Token, slot, record, position and length
of every row live in one tensor on the device; the step reads them, chooses the next tokens, writes
them back as the fresh ones and advances the positions. Steps follow each other without data of the
host, which may read the tokens of a step while the next one runs.

On CUDA a step is captured once for each bucket of rows; elsewhere the same code is called directly.
Rows of a bucket that hold no sequence write to a slot of their own and do not advance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from llmqat.errors import ConfigError
from llmqat.runtime.forward import Forward
from llmqat.runtime.sampling import Sampler, Sampling
from llmqat.runtime.transfer import upload

FIELDS = ("tokens", "slots", "records", "greedy_until", "advance", "positions", "lengths")
"""Rows of the state: ``lengths`` is ``positions + 1``, which is also the step of spec 15."""
TOKENS, COUNTERS = FIELDS.index("tokens"), FIELDS.index("positions")
ROW_ALIGNMENT = 16
"""Rows of the state are a multiple of it: each field begins where 16-byte loads may begin."""
WARM_UPS = 2
"""Runs before a capture: the first compiles kernels, the second allocates as a replay will."""
NEVER = 2**62

Body = Callable[[], Tensor]
Undo = Callable[[], object]
Graph = tuple[Callable[[], None], Tensor]
"""What replays a body, and where that leaves its result."""
Capture = Callable[[Body, Undo], Graph]
"""Make a graph of a body. It may run the body before if it then undoes that."""


@dataclass(frozen=True)
class DecodePlan:
    """How decode steps run.

    Args:
        padded: row counts are rounded up to buckets, so that few forms of the step exist.
        lag: steps that are under way before the tokens of one are read, 0 or 1. A sequence whose
            end was not foreseen has that many rows in vain.
        capture: makes a graph of a step; None calls it.
    """

    padded: bool = False
    lag: int = 0
    capture: Capture | None = None

    def scratch_slots(self, max_slots: int) -> int:
        """Slots of the cache for rows without a sequence: 1 where a bucket can have some."""
        sizes = bucket_sizes(max_slots)
        return int(self.padded and sizes != tuple(range(1, max_slots + 1)))


def make_plan(device: torch.device, backends: Mapping[str, str], graphs: bool | None) -> DecodePlan:
    """The plan for a device.

    Args:
        backends: operator -> backend, of every operator of a step.
        graphs: None captures on CUDA where every operator has a kernel.

    Raises:
        ConfigError: ``graphs`` is true where a step cannot be captured.
    """
    cuda = device.type == "cuda"
    slow = sorted(op for op, backend in backends.items() if backend == "reference")
    if graphs and not cuda:
        raise ConfigError(
            f"graphs: CUDA graphs need a CUDA device, not {device.type}; leave it out"
        )
    if graphs and slow:
        raise ConfigError(
            f"graphs: {slow[0]} runs on the reference backend, which reads values on the host; use"
            " backend auto, or no graphs"
        )
    if cuda and graphs is not False and not slow:
        return DecodePlan(padded=True, lag=1, capture=CudaCapture(device))
    return DecodePlan(lag=int(cuda))


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... and ``max_rows`` itself."""
    powers = [1 << i for i in range((max_rows - 1).bit_length())]
    return (*powers, max_rows)


class CudaCapture:
    """Captures bodies as CUDA graphs that share one memory pool: they never run at one time, and
    what outlives a replay lies outside it, or is read before the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, body: Body, undo: Undo) -> Graph:
        """Run ``body`` on a side stream, so that its kernels are compiled and their libraries have
        their workspaces; then capture it.
        """
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    body()
                    undo()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph, other = torch.cuda.CUDAGraph(), next(iter(self._graphs), None)
            pool = None if other is None else other.pool()  # a pool ends with its last graph
            # Other threads may allocate meanwhile: only this one's calls are checked.
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                result = body()
            self._graphs.add(graph)
        return graph.replay, result


class Row(NamedTuple):
    """One sequence of a step.

    ``token`` is its fresh token, or -1 if that is on the device: at ``source`` among the rows of
    the step before, or at ``width`` and on among the fresh ones handed to
    :meth:`StaticDecode.load`. ``position`` is where it stands; while a sequence has fewer than
    ``greedy_until`` tokens, it takes the most likely one.
    """

    slot: int
    record: int
    position: int
    greedy_until: int
    token: int = -1
    source: int = -1


class _Views(NamedTuple):
    """The first rows of the state, one bucket's."""

    tokens: Tensor
    slots: Tensor
    records: Tensor
    greedy_until: Tensor
    advance: Tensor
    positions: Tensor
    lengths: Tensor
    counters: Tensor
    greedy: Tensor


class StaticDecode:
    """Decode steps of up to ``max_rows`` sequences on buffers that stay where they are.

    Args:
        forward: with its caches; ``scratch`` is the slot of rows without a sequence, or None where
            the plan needs none.
        screens: whether greedy tokens come from the head's screen.
    """

    def __init__(
        self,
        forward: Forward,
        max_rows: int,
        plan: DecodePlan,
        *,
        scratch: int | None,
        screens: bool,
    ) -> None:
        self._forward, self._plan, self._screens = forward, plan, screens
        self._device = forward.weights.embedding.device
        self._sizes = bucket_sizes(max_rows) if plan.padded else tuple(range(1, max_rows + 1))
        self.width = -(-max_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
        shape = (len(FIELDS), self.width)
        self._state = torch.zeros(shape, dtype=torch.int64, device=self._device)
        self._greedy = torch.ones(self.width, dtype=torch.bool, device=self._device)
        self._idle = Row(0 if scratch is None else scratch, 0, 0, NEVER, 0)
        self._views: dict[int, _Views] = {}
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._rows, self._bucket, self._greedy_steps = 0, 0, 0
        self._settings = Sampling(greedy=True)
        self._sample: Callable[..., Tensor] | None = None

    @torch.inference_mode()
    def configure(self, sampler: Sampler) -> None:
        """How tokens are chosen from now on; graphs of other settings are dropped."""
        settings = sampler.sampling
        if settings.greedy:  # of which nothing else matters
            settings = Sampling(greedy=True)
        if (settings, sampler.kernel) != (self._settings, self._sample):
            self._settings, self._sample = settings, sampler.kernel
            self._graphs.clear()
        self._greedy.fill_(True)

    @property
    def captured(self) -> tuple[int, ...]:
        """Buckets that have a graph."""
        return tuple(sorted({bucket for bucket, _ in self._graphs}))

    @torch.inference_mode()
    def load(self, rows: Sequence[Row], fresh: Sequence[Tensor] = ()) -> None:
        """The sequences of the following steps. ``fresh``: tokens int64 that are on the device."""
        state, bucket = self._state, next(size for size in self._sizes if size >= len(rows))
        first_given = self.width + sum(tokens.shape[0] for tokens in fresh)
        table: list[list[int]] = [[] for _ in range(len(FIELDS) + 1)]
        for i, row in enumerate((*rows, *[self._idle] * (bucket - len(rows)))):
            given, live = row.token >= 0, int(i < len(rows))
            fields = (row.token, row.slot, row.record, row.greedy_until, live)
            source = first_given + i if given else row.source
            for column, value in zip(
                table, (*fields, row.position, row.position + 1, source), strict=True
            ):
                column.append(value)
        uploaded = upload(table, torch.int64, self._device)
        known = torch.cat((state[TOKENS], *fresh, uploaded[TOKENS])).clamp_(min=0)
        uploaded[TOKENS] = known.index_select(0, uploaded[-1])
        state[:, :bucket].copy_(uploaded[:-1])
        self._rows, self._bucket = len(rows), bucket
        left = (row.greedy_until - row.position - 1 for row in rows)
        self._greedy_steps = NEVER if self._settings.greedy else min(left, default=0)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token of every row that was loaded, int64 [n]; -1 where there is none (and 0 is
        what that row continues with). Overwritten by the next step.
        """
        screened = self._screens and self._greedy_steps > 0
        self._greedy_steps -= 1
        rows = self._views.get(self._bucket) or self._view(self._bucket)
        if self._plan.capture is None:
            chosen = self._body(rows, screened)
        else:
            key = (self._bucket, screened)
            if key not in self._graphs:
                self._graphs[key] = self._capture(rows, screened, self._plan.capture)
            replay, chosen = self._graphs[key]
            replay()
        return chosen if self._rows == self._bucket else chosen[: self._rows]

    def _view(self, bucket: int) -> _Views:
        fields = self._state[:, :bucket]
        views = _Views(*fields.unbind(), fields[COUNTERS:], self._greedy[:bucket])
        self._views[bucket] = views
        return views

    def _body(self, rows: _Views, screened: bool) -> Tensor:
        """The step itself: operators on the device, no value read."""
        stream = self._forward(rows.tokens, rows.slots, rows.positions, rows.lengths)
        if screened:
            chosen = self._forward.greedy(stream)
        else:
            settings, sample = self._settings, self._sample
            assert sample is not None, "configure() comes first"
            if not settings.greedy:
                torch.lt(rows.lengths, rows.greedy_until, out=rows.greedy)
            chosen = sample(
                self._forward.logits(stream),
                rows.records,
                rows.lengths,
                rows.greedy,
                settings.seed,
                settings.temperature,
                settings.top_k,
            )
        torch.clamp(chosen, min=0, out=rows.tokens)
        rows.counters.add_(rows.advance)
        return chosen

    def _capture(self, rows: _Views, screened: bool, capture: Capture) -> Graph:
        """A graph of the step. The runs before it are the coming step itself, done early: they
        write to the cache what the replay will write again, and the state is put back.
        """
        before = self._state.clone()
        return capture(lambda: self._body(rows, screened), lambda: self._state.copy_(before))
