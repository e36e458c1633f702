"""Ways to decode and prefill, each as a function that runs once and returns tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attention import random_cache_codes
from benchmarks.compiled_decode import PlainDecoder
from llmqat import Engine
from llmqat.runtime.graphs import NEVER, Row
from llmqat.runtime.sampling import Sampler, Sampling

Rate = Callable[[], float]
"""Runs once; tokens a second."""


def rate_of_steps(step: Callable[[], Any], count: int, batch: int, device: torch.device) -> float:
    """Tokens a second of ``count`` steps, the device idle before and after."""
    _wait(device)
    begin = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return count * batch / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Arrivals:
    """When tokens arrived: the rate from the moment every sequence had one."""

    def __init__(self, batch: int) -> None:
        self._batch, self._seen = batch, set[int]()
        self._begin = self._last = 0.0
        self._count = 0

    def __call__(self, record: int, token: int) -> None:
        now = time.perf_counter()
        if len(self._seen) < self._batch:
            self._seen.add(record)
            self._begin = now
        else:
            self._count += 1
            self._last = now

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self._count / (self._last - self._begin)


def prompts_of(batch: int, length: int, vocab: int) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, vocab, (batch, length), generator=generator).tolist()  # type: ignore[no-any-return]


def engine_generate(engine: Engine, prompts: list[list[int]], tokens: int) -> Rate:
    """A greedy continuation of every prompt, as a user asks for it."""

    def run() -> float:
        arrivals = Arrivals(len(prompts))
        engine.generate(prompts, tokens, on_token=arrivals)
        return arrivals.rate

    return run


def engine_steps(engine: Engine, context: int, tokens: int) -> Rate:
    """Decode steps of every slot up to ``context`` tokens, on caches of random codes."""
    batch, device = engine.max_slots, engine.device
    for index, cache in enumerate(engine.caches):
        random_cache_codes(cache, index)

    def run() -> float:
        engine.reset()
        engine.static.configure(Sampler(Sampling(greedy=True), device))
        rows = [Row(slot, slot, context - tokens, NEVER, 1 + slot) for slot in range(batch)]
        for slot in range(batch):
            engine.assume_length(slot, context - tokens)
        engine.static.load(rows)
        engine.static.step()  # captured now, if it was not
        engine.decoded(range(batch))

        def step() -> None:
            engine.static.step()
            engine.decoded(range(batch))

        return rate_of_steps(step, tokens - 1, batch, device)

    return run


def engine_prefill(engine: Engine, prompt: list[int]) -> Rate:
    """Prompt tokens a second until the logits after the last one are there."""

    def run() -> float:
        begin = time.perf_counter()
        int(engine.prefill([0], [prompt])[0].argmax())
        return len(prompt) / (time.perf_counter() - begin)

    return run


def decoder_steps(decoder: PlainDecoder, batch: int, context: int, tokens: int) -> Rate:
    """Steps of the compiled decoder up to ``context`` tokens."""

    def run() -> float:
        decoder.start([1 + i for i in range(batch)], context - tokens)
        decoder.step()
        return rate_of_steps(decoder.step, tokens - 1, batch, decoder.device)

    return run


class _Times:
    """A streamer that only looks at the clock; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.sum().item()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def transformers_generate(
    model: nn.Module, prompts: list[list[int]], tokens: int, **options: Any
) -> Rate:
    """A greedy continuation by `generate`; the rate from the first new token to the last."""
    ids = torch.tensor(prompts, device=model.device)

    def run() -> float:
        begin = time.perf_counter()
        seen = _Times()
        common = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
        if len(prompts) == 1:
            model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, streamer=seen, **common
            )
            return (len(seen.times) - 2) / (seen.times[-1] - seen.times[1])
        # A streamer takes one sequence: two runs of different length, the difference is decoding.
        marks = []
        for count in (1, tokens):
            begin = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **common).sum().item()
            marks.append(time.perf_counter() - begin)
        return len(prompts) * (tokens - 1) / (marks[1] - marks[0])

    return run


def transformers_prefill(model: nn.Module, prompt: list[int]) -> Rate:
    """Prompt tokens a second of one forward with a cache."""
    ids = torch.tensor([prompt], device=model.device)

    @torch.inference_mode()
    def run() -> float:
        begin = time.perf_counter()
        int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return len(prompt) / (time.perf_counter() - begin)

    return run
