"""What `bench kv` times: a decode step over a cache of some length, in the engine or, for families
that it does not run, in transformers.

No cache is written by a prefill, which would take hours at long lengths; it is filled with random
codes and equal scales. How long a token takes depends on the lengths alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmqat.errors import ConfigError
from llmqat.eval.cost import ModelShape
from llmqat.runtime.engine import Engine
from llmqat.runtime.support import attention_window
from llmqat.runtime.transformers_engine import TransformersEngine
from llmqat_kernels import KVCache


class Subject(ABC):
    """One model and a cache that changes.

    Attributes:
        device: of model and cache. batch: sequences at one time.
        limit: tokens of the longest sequence; limited_by: what sets it.
    """

    device: torch.device
    batch: int
    limit: int
    limited_by: str

    @abstractmethod
    def fill(self, bits: int, length: int) -> Callable[[int], object]:
        """Make a full cache; returns a step that decodes the last of `length` tokens, given its
        number.

        Raises:
            ConfigError: there is no such cache.
        """

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the cache that was filled and stepped."""

    @abstractmethod
    def empty(self) -> None:
        """Give the memory of the cache back."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """`weight_bytes` and `backends`, by kind."""


class EngineSubject(Subject):
    """The engine's cache, in every width; the model's weights are moved into the engine."""

    def __init__(self, model: nn.Module, lengths: list[int], *, kv_mode: str, batch: int) -> None:
        self.limit, self.limited_by = _longest(model)
        self.batch, self.kv_mode = batch, kv_mode
        self._engine = Engine(
            model,
            max_slots=batch,
            max_len=max((length for length in lengths if length <= self.limit), default=1),
            kv_bits=16,
            kv_mode=kv_mode,
            graphs=False,  # no slot for padding
        )
        self.device = self._engine.device
        self.empty()

    def fill(self, bits: int, length: int) -> Callable[[int], object]:
        engine, slots = self._engine, list(range(self.batch))
        engine.replace_cache(max_len=length, kv_bits=bits, kv_mode=self.kv_mode)
        fill(engine.caches)

        def step(number: int) -> Tensor:
            for slot in slots:
                engine.assume_length(slot, length - 1)
            return engine.decode([number % engine.vocab_size] * self.batch, slots)

        return step

    @property
    def cache_bytes(self) -> int:
        return self._engine.cache_bytes

    def empty(self) -> None:
        self._engine.replace_cache(max_len=1)

    def describe(self) -> dict[str, Any]:
        return {"weight_bytes": self._engine.weight_bytes, "backends": self._engine.backends()}


class TransformersSubject(Subject):
    """transformers' forward and its cache of floats, which is all there is beside the engine."""

    def __init__(self, model: nn.Module, *, batch: int) -> None:
        self._model = model.eval()
        self._engine = TransformersEngine(model, max_slots=batch)
        self._shape = ModelShape.from_config(model.config)
        self._cache = DynamicCache(config=model.config)
        self.device, self.batch = self._engine.device, batch
        self.limit, self.limited_by = _longest(model)

    def fill(self, bits: int, length: int) -> Callable[[int], object]:
        model, shape = self._model, self._shape
        if bits != 16:
            raise ConfigError(
                f"codes are held by the engine, which does not run {type(model).__name__}"
            )
        self.empty()
        size = (self.batch, shape.kv_heads, length - 1, shape.head_dim)
        floats = torch.randn(size, device=self.device).to(self._engine.dtype)
        for layer in range(shape.layers):
            self._cache.update(floats, floats, layer)

        seen = torch.ones((self.batch, length), dtype=torch.int64, device=self.device)

        def step(number: int) -> object:
            if self._cache.get_seq_length() == length:
                self._cache.crop(-1)
            return model(
                input_ids=seen[:, -1:] * (number % self._engine.vocab_size),
                attention_mask=seen,
                position_ids=seen[:, -1:] * (length - 1),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )

        return step

    @property
    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def empty(self) -> None:
        self._cache = DynamicCache(config=self._model.config)

    def describe(self) -> dict[str, Any]:
        return {"weight_bytes": self._engine.weight_bytes, "backends": self._engine.backends()}


def _longest(model: nn.Module) -> tuple[int, str]:
    """Tokens of the longest sequence that can be run, and what sets the limit."""
    window = attention_window(model)
    positions = int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    if window is None or positions <= window:
        return positions, f"the model has {positions} positions"
    return window, f"the engine has no windows, and the model's sliding window is {window} tokens"


def fill(caches: list[KVCache], seed: int = 0) -> None:
    """Write random codes with scale 1 / qmax (or standard normal floats) into every layer.

    All layers get the same ones: no result depends on them here.
    """
    first = caches[0]
    generator = torch.Generator(first.k_codes.device).manual_seed(seed)
    for name in ("k", "v"):
        codes, scale = getattr(first, f"{name}_codes"), getattr(first, f"{name}_scale")
        _random_codes(codes, first.bits, generator)
        if first.bits != 16:
            scale.fill_(1 / (2 ** (first.bits - 1) - 1))
        for cache in caches[1:]:
            getattr(cache, f"{name}_codes").copy_(codes)
            getattr(cache, f"{name}_scale").copy_(scale)


def _random_codes(codes: Tensor, bits: int, generator: torch.Generator) -> None:
    """In place; -2^(bits-1) never occurs (spec 1), in a packed byte neither."""
    if bits == 16:
        codes.normal_(generator=generator)
    elif bits == 8:
        codes.random_(-127, 128, generator=generator)
    else:
        low, high = (torch.empty_like(codes).random_(1, 16, generator=generator) for _ in range(2))
        torch.bitwise_or((low ^ 8), (high ^ 8) << 4, out=codes)  # 1..15 less 8, two's complement
