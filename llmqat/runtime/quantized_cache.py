"""The quantized KV cache inside transformers' own ``generate``: codes and scales instead of keys
and values, written and read by the engine's operators.

    cache = QuantizedCache(model, max_len=512)
    model.generate(**inputs, past_key_values=cache)

transformers hands keys to a cache after RoPE, but `paper` mode stores them before it; so the
model's attention modules learn to give this cache what the projections gave. Without one of these
caches they do what they did.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.config import KV_MODES, PACKED_KV_BITS, QATConfig, QuantSpec
from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat.models.families import find_family, iter_blocks
from llmqat.runtime.support import attention_window, check_cache, default_max_len
from llmqat.runtime.weights import rotary_tables
from llmqat.state import state_of
from llmqat_kernels import KVCache
from llmqat_kernels import nn as qnn
from llmqat_kernels.errors import InvalidArgument


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one forward, which all layers share: slot, position and visible length of each,
    int64 [n]; ``kept`` are their places among the B * T columns, or None if that is all.
    """

    slots: Tensor
    positions: Tensor
    lengths: Tensor
    kept: Tensor | None

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three numbers of every token."""
        return self.slots, self.positions, self.lengths

    def pick(self, rows: Tensor) -> Tensor:
        """Their rows of [B * T, ...]."""
        return rows if self.kept is None else rows.index_select(0, self.kept)

    def spread(self, rows: Tensor, columns: int) -> Tensor:
        """Back to B * T rows, zeros where there is no token."""
        if self.kept is None:
            return rows
        return rows.new_zeros((columns, *rows.shape[1:])).index_copy_(0, self.kept, rows)


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
        raise ConfigError(
            "past_key_values: this QuantizedCache was made for another model; make one with"
            " QuantizedCache(model)"
        )

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


class QuantizedCache(compat.Cache):
    """A ``past_key_values`` of 4- or 8-bit codes (or 16-bit floats) for a LLaMA-family model.

    Causal attention over left- or right-padded batches; sequences of one cache stay together.
    Beam search, cropping and batch selection work; attention weights are not given.

    Args:
        model: plain, prepared or converted; its attention modules are changed so that they fill
            such caches (and do as before with any other).
        max_len: tokens per sequence; None takes 2048 or, if fewer, the model's positions and
            window.
        kv_bits, kv_mode: None takes the model's own (16 and ``paper`` for a plain model).

    Raises:
        ConfigError: a family without RoPE, or an unsupported KV setting. InvalidArgument:
            ``max_len``.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_len: int | None = None,
        kv_bits: int | None = None,
        kv_mode: str | None = None,
    ) -> None:
        family, state = find_family(model), state_of(model)
        if family.positions is not None:
            raise ConfigError(
                f"model: {family.architecture} has no RoPE; use transformers' own caches"
            )
        config = QATConfig(16, 16, 16) if state is None else state.config
        self.bits = min(config.kv_bits if kv_bits is None else kv_bits, 16)
        self.mode = config.kv_mode if kv_mode is None else kv_mode
        if self.bits not in PACKED_KV_BITS:
            raise ConfigError(f"kv_bits: {self.bits} has no packed KV cache; use 4, 8 or 16")
        if self.mode not in KV_MODES:
            raise ConfigError(f"kv_mode: {self.mode!r} is not one of {', '.join(KV_MODES)}")
        check_cache(family, self.bits, self.mode)
        longest = min(model.config.max_position_embeddings, attention_window(model) or 2**31)
        self.max_len = default_max_len(model) if max_len is None else max_len
        if not 1 <= self.max_len <= longest:
            raise InvalidArgument(f"max_len: {self.max_len} is outside 1..{longest}")
        attentions = [
            block.get_submodule(family.attention) for _, block in iter_blocks(model, family)
        ]
        super().__init__(layers=[QuantizedLayer(self.max_len) for _ in attentions])
        device = model.model.embed_tokens.weight.device
        self.cos, self.sin = rotary_tables(model.model.rotary_emb, self.max_len, device)
        self._lengths: Tensor | None = None
        self._tokens: _Tokens | None = None
        for attention in attentions:
            _connect(attention)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, as allocated."""
        return sum(layer.store.nbytes for layer in self.layers if layer.store is not None)

    def attend(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """Write K and V of block ``index``, then attend.

        Args:
            query: [B, T, H, D] before RoPE. key, value: [B, T, Hkv, D], key before RoPE.
            mask: of transformers, [B or 1, 1, T, columns], or None.

        Returns:
            [B, T, H * D].

        Raises:
            InvalidArgument: more than ``max_len`` tokens, or positions that do not count them.
        """
        batch, length = query.shape[:2]
        layer = self.layers[index]
        if index == 0:
            self._tokens = self._next_tokens(batch, length, mask, position_ids, query.device)
        tokens = self._tokens
        assert tokens is not None
        if layer.store is None:
            layer.store = KVCache.allocate(
                batch,
                key.shape[2],
                self.max_len,
                key.shape[3],
                bits=self.bits,
                mode=self.mode,
                device=key.device,
                dtype=key.dtype,
            )
        q, k, v = (tokens.pick(heads.flatten(0, 1)).contiguous() for heads in (query, key, value))
        qk.rope_quantize_append(
            k, v, self.cos, self.sin, layer.store, tokens.slots, tokens.positions
        )
        mixed = qk.attention_decode(
            qk.rope(q, self.cos, self.sin, tokens.positions),
            layer.store,
            self.cos,
            self.sin,
            tokens.slots,
            tokens.lengths,
            scaling=scaling,
        )
        layer.seen += length
        return tokens.spread(mixed, batch * length).view(batch, length, -1)

    def _next_tokens(
        self,
        batch: int,
        length: int,
        mask: Tensor | None,
        position_ids: Tensor | None,
        device: torch.device,
    ) -> _Tokens:
        """Which columns hold tokens, and where those go."""
        seen = self.layers[0].seen
        if self._lengths is None or seen == 0:
            self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        if self._lengths.shape[0] != batch:
            raise InvalidArgument(
                f"past_key_values: holds {self._lengths.shape[0]} sequences, not {batch}; make"
                " another cache"
            )
        real = torch.ones((batch, length), dtype=torch.bool, device=device)
        if mask is not None:  # causal: a token sees itself, padding sees nothing
            itself = mask[:, 0].diagonal(offset=seen, dim1=-2, dim2=-1)
            real &= itself if itself.dtype == torch.bool else itself == 0
        places = self._lengths[:, None] + real.cumsum(1) - 1
        kept = None if bool(real.all()) else real.flatten().nonzero().flatten()
        self._lengths = self._lengths + real.sum(1)
        if seen + length > self.max_len and int(self._lengths.max()) > self.max_len:
            raise InvalidArgument(
                f"past_key_values: {int(self._lengths.max())} tokens, max_len is {self.max_len}"
            )
        if position_ids is not None and not torch.equal(
            places[real], position_ids.expand(batch, length)[real]
        ):
            raise InvalidArgument(
                "position_ids: a QuantizedCache counts the tokens of each sequence from 0; leave"
                " them out"
            )
        slots = torch.arange(batch, device=device)[:, None].expand(batch, length).flatten()
        tokens = _Tokens(slots, places.flatten(), places.flatten() + 1, kept)
        return tokens if kept is None else _Tokens(*map(tokens.pick, tokens.rows), kept)

    def reset(self) -> None:
        """Forget every token; the allocated store is used again."""
        for layer in self.layers:
            layer.reset()
        self._lengths = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, int64 [n], in that order."""
        if self._lengths is None:
            return
        self._lengths = self._lengths.index_select(0, indices.to(self._lengths.device))
        for layer in self.layers:
            layer.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, one behind the other."""
        if self._lengths is not None:
            rows = torch.arange(len(self._lengths), device=self._lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every sequence; a positive number is what
        remains.
        """
        seen = self.layers[0].seen
        removed = max(seen - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if self._lengths is None or removed == 0:
            return
        self._lengths = (self._lengths - removed).clamp(min=0)
        for layer in self.layers:
            layer.seen -= removed


class CachedAttention(nn.Module):
    """What an attention module becomes: with a :class:`QuantizedCache` it hands on what its
    projections gave; otherwise it is the class it was.
    """

    def forward(
        self, hidden_states: Any, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the class below: hidden states [B, T, K] -> [B, T, K] and no attention weights."""
        if not isinstance(past_key_values, QuantizedCache):
            return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        a: Any = self
        query, key, value = (
            _without_output_quantizer(linear)(hidden_states).unflatten(-1, (-1, a.head_dim))
            for linear in (a.q_proj, a.k_proj, a.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = a.q_norm(query), a.k_norm(key)
        mixed = past_key_values.attend(
            a.layer_idx,
            query,
            key,
            value,
            a.scaling,
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
        )
        return a.o_proj(mixed), None


_CLASSES: dict[type, type] = {}


def _connect(attention: nn.Module) -> None:
    cls = type(attention)
    if isinstance(attention, CachedAttention):
        return
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Cached{cls.__name__}", (CachedAttention, cls), {})
    qnn.become(attention, _CLASSES[cls])


def _without_output_quantizer(linear: nn.Module) -> nn.Module:
    """The linear without the KV quantizer of its output, which the cache applies; it shares
    everything with the one it came from.
    """
    spec = getattr(linear, "spec", None)
    if spec is None or not spec.output.enabled:
        return linear
    bare = copy.copy(linear)
    bare.spec = replace(spec, output=QuantSpec(16))
    return bare
