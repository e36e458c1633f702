"""Candidates that take turns, in groups that may not fit the memory together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import cuda
from benchmarks.cells import check_alive
from benchmarks.decode_rates import Rate
from benchmarks.entry import reason_of

ALONE = "measured by itself, not in turns: too large to be there at one time with the others"
MEMORY_SHARE = 0.9
"""Of the free memory: what candidates that take turns may need together."""


def free_bytes(device: torch.device) -> float:
    """Memory that nothing holds."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


class Turns:
    """Rates of candidates that take turns, and why others have none.

    Candidates come in groups, the quick ones first, so that a long compilation cannot cost what is
    measured already; the first of all takes turns with every group that fits the memory beside it.
    """

    def __init__(self, rounds: int, device: torch.device, deadline: float) -> None:
        self._rounds, self._device, self._deadline = rounds, device, deadline
        self._anchor: dict[str, Rate] = {}
        self.rates: dict[str, list[float]] = {}
        self.notes: dict[str, str] = {}

    def add(self, makers: Mapping[str, Callable[[], Rate]], needed: float = 0.0) -> None:
        """Set up a group and measure it; where ``needed`` bytes are not free, each candidate of it
        without the others and the first of all. A first run of each does not count; past the
        deadline nothing more is set up, and one round is enough.
        """
        cuda.release(self._device)
        if needed <= MEMORY_SHARE * free_bytes(self._device):
            self._measure(makers)
            return
        for name, make in makers.items():
            self._anchor = {}
            cuda.release(self._device)
            self._measure({name: make})
            if name in self.rates:
                self.notes.setdefault(name, ALONE)
        self._anchor = {}

    def _measure(self, makers: Mapping[str, Callable[[], Rate]]) -> None:
        ready = dict(self._anchor)
        for name, make in makers.items():
            if time.monotonic() > self._deadline and (ready or self.rates):
                self.notes[name] = "left out: --budget"
            elif (run := self._ready(name, make)) is not None:
                ready[name] = run
        if set(ready) == set(self._anchor):
            return
        for index in range(self._rounds):
            if index and time.monotonic() > self._deadline:
                break
            for name in list(ready):
                try:
                    rate = ready[name]()
                except Exception as error:
                    del ready[name]
                    self._leave_out(name, f"stopped in round {index + 1}: {reason_of(error)}")
                else:
                    self.rates.setdefault(name, []).append(rate)
        if not self._anchor:
            self._anchor = dict(list(ready.items())[:1])

    def _ready(self, name: str, make: Callable[[], Rate]) -> Rate | None:
        """A candidate after its first run; None where it has failed."""
        begin = time.monotonic()
        try:
            run = make()
            run()
        except Exception as error:  # other people's code, memory: the reason is the finding
            self._leave_out(name, f"left out: {reason_of(error)}")
            return None
        print(f"  {name}: ready after {time.monotonic() - begin:.0f} s", flush=True)
        return run

    def _leave_out(self, name: str, note: str) -> None:
        self._anchor.pop(name, None)
        self.notes[name] = note
        check_alive(self._device, name, note)
