"""One block's part of a quantized cache, in the form of transformers' cache layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat_kernels import KVCache


class QuantizedLayer(compat.CacheLayerMixin):
    """One block's codes and scales, :attr:`store`, which the first forward allocates."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    store: KVCache | None = None

    def __init__(self, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        self.seen = 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the next mask, and where it begins."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self.max_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the attention modules allocate."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """ConfigError: an attention module of another model has called."""
        raise another_model()

    def reset(self) -> None:
        """Forget every token."""
        self.seen = 0

    def offload(self) -> None:
        """Nothing: codes stay where they are."""

    def prefetch(self) -> None:
        """Nothing: codes stay where they are."""

    def select(self, rows: Tensor) -> None:
        """Continue with the sequences ``rows``, int64 [n]; one may stand several times."""
        if self.store is None:
            return
        old = self.store
        self.store = replace(
            old,
            **{
                name: value if value.dim() == 1 else value.index_select(0, rows.to(value.device))
                for name in ("k_codes", "k_scale", "v_codes", "v_scale")
                for value in (getattr(old, name),)
            },
        )

    def reserve(self, batch: int, key: Tensor, bits: int, mode: str) -> KVCache:
        """The store for ``batch`` sequences of keys like ``key``, [B, T, Hkv, D].

        A store without tokens may have served another batch size: nothing keeps its slots.
        """
        store = self.store
        if store is None or (self.seen == 0 and len(store.k_codes) != batch):
            heads, width = key.shape[2:]
            self.store = None  # its memory is free before the next is taken
            store = self.store = KVCache.allocate(
                batch,
                heads,
                self.max_len,
                width,
                bits=bits,
                mode=mode,
                device=key.device,
                dtype=key.dtype,
            )
        return store


def another_model() -> ConfigError:
    """What another model's forward is refused with."""
    return ConfigError(
        "past_key_values: this QuantizedCache was made for another model; make one with"
        " QuantizedCache(model)"
    )
