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
from llmqat.runtime.cache_masks import READABLE, check_form, is_causal, new_columns, not_causal
from llmqat.runtime.quantized_layer import QuantizedLayer, another_model
from llmqat.runtime.support import attention_window, check_cache, default_max_len
from llmqat.runtime.weights import rotary_tables
from llmqat.state import state_of
from llmqat_kernels import nn as qnn
from llmqat_kernels.errors import InvalidArgument


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one forward, which all layers share: slot, position and visible length of each,
    int64 [n]; ``kept`` are their places among the B * T columns, or None if that is all. ``real``
    is bool [B, columns]: which columns hold tokens, those of this forward being the last.
    """

    slots: Tensor
    positions: Tensor
    lengths: Tensor
    kept: Tensor | None
    real: Tensor

    def pick(self, rows: Tensor) -> Tensor:
        """Their rows of [B * T, ...]."""
        return rows if self.kept is None else rows.index_select(0, self.kept)

    def spread(self, rows: Tensor, columns: int) -> Tensor:
        """Back to B * T rows, zeros where there is no token."""
        if self.kept is None:
            return rows
        return rows.new_zeros((columns, *rows.shape[1:])).index_copy_(0, self.kept, rows)


class QuantizedCache(compat.Cache):
    """A ``past_key_values`` of 4- or 8-bit codes (or 16-bit floats) for a LLaMA-family model.

    Causal attention over left- or right-padded batches, with the masks of sdpa or eager attention;
    sequences of one cache stay together. Beam search, cropping and batch selection work; attention
    weights are not given. A forward that is refused leaves the cache as it was.

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
        # as many as the model runs: it may hold more blocks than its config says
        blocks = [block for _, block in iter_blocks(model, family)]
        blocks = blocks[: model.config.num_hidden_layers]
        attentions = [block.get_submodule(family.attention) for block in blocks]
        super().__init__(layers=[QuantizedLayer(self.max_len) for _ in attentions])
        device = model.model.embed_tokens.weight.device
        self.cos, self.sin = rotary_tables(model.model.rotary_emb, self.max_len, device)
        self.made_for = (
            family.architecture,
            len(attentions),
            model.config.num_key_value_heads,
            config.kv_bits,
            config.kv_mode,
            _rotation(model),
        )
        self._real: Tensor | None = None
        self._tokens: _Tokens | None = None
        self._masks: list[Tensor | None] = []
        for attention in attentions:
            _connect(attention, self.made_for)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, as allocated."""
        return sum(layer.store.nbytes for layer in self.layers if layer.store is not None)

    def check_model(self, made_for: tuple[Any, ...], layers: int) -> None:
        """ConfigError unless a model with this :attr:`made_for`, running ``layers`` blocks, fills
        the cache.

        Copies of one model do. With fewer blocks no forward would come to its end.
        """
        if made_for != self.made_for or layers < len(self.layers):
            raise another_model()

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
            mask: of transformers, bool (True is seen) or added floats [B or 1, 1 or H, T, columns];
                None hides no column.

        Returns:
            [B, T, H * D].

        Raises:
            InvalidArgument: no tokens or more than ``max_len``, another number of sequences, a mask
                that is not causal over padded batches, or positions that do not count the tokens.
            ConfigError: the mask of an attention function that has its own kind.
        """
        batch, length = query.shape[:2]
        if index == 0:
            self._tokens = self._next_tokens(query, mask, position_ids)
            self._masks = [mask]
        tokens = self._tokens
        assert tokens is not None
        self._check_other_mask(mask, tokens, length)
        store = self.layers[index].reserve(batch, key, self.bits, self.mode)
        q, k, v = (tokens.pick(heads.flatten(0, 1)).contiguous() for heads in (query, key, value))
        qk.rope_quantize_append(k, v, self.cos, self.sin, store, tokens.slots, tokens.positions)
        mixed = qk.attention_decode(
            qk.rope(q, self.cos, self.sin, tokens.positions),
            store,
            self.cos,
            self.sin,
            tokens.slots,
            tokens.lengths,
            scaling=scaling,
        )
        if index == len(self.layers) - 1:
            self._commit(tokens.real)
        return tokens.spread(mixed, batch * length).view(batch, length, -1)

    def _next_tokens(
        self, query: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> _Tokens:
        """Which columns hold tokens, and where those go; the cache stays as it is."""
        batch, length = query.shape[:2]
        before = self._columns_before(batch, length, query.device)
        new = new_columns(mask, before, length)
        real = torch.cat((before, new), dim=1)
        self._check_capacity(real)
        places = before.sum(1, keepdim=True) + new.cumsum(1) - 1
        whole = self._check_values(new, real, places, mask, position_ids)
        slots = torch.arange(batch, device=query.device)[:, None].expand(batch, length)
        kept = None if whole else new.flatten().nonzero().flatten()
        rows = (slots.flatten(), places.flatten(), places.flatten() + 1)
        if kept is not None:
            rows = (rows[0][kept], rows[1][kept], rows[2][kept])
        return _Tokens(*rows, kept, real)

    def _columns_before(self, batch: int, length: int, device: torch.device) -> Tensor:
        """bool [B, seen]: which columns of the cache hold tokens."""
        if not batch or not length:
            raise InvalidArgument(
                f"input_ids: {batch} sequences of {length} new tokens; give at least one of each"
            )
        real = self._real
        if real is None or real.shape[1] == 0:
            return torch.zeros((batch, 0), dtype=torch.bool, device=device)
        if len(real) != batch:
            raise InvalidArgument(
                f"past_key_values: holds {len(real)} sequences, not {batch}; make another cache"
            )
        return real

    def _check_capacity(self, real: Tensor) -> None:
        """Reads the device only where padding decides."""
        if real.shape[1] > self.max_len and int(real.sum(1).max()) > self.max_len:
            raise InvalidArgument(
                f"past_key_values: {int(real.sum(1).max())} tokens, max_len is {self.max_len}"
            )

    def _check_values(
        self,
        new: Tensor,
        real: Tensor,
        places: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> bool:
        """Check mask and positions; whether every new column is a token.

        All answers come in one read: on a GPU each read waits for everything before it.
        """
        counted = torch.ones((), dtype=torch.bool, device=new.device)
        if position_ids is not None:
            counted = ((places == position_ids) | ~new).all()
        # padding alone is how a padded prompt may begin; later it is a mask without the past
        some = new.any() | ~real.any()
        answers = (new.all(), some, is_causal(mask, real, new), counted)
        whole, visible, causal, in_order = torch.stack(answers).tolist()
        if not visible:
            raise InvalidArgument(f"attention_mask: it hides every new token; {READABLE}")
        if not causal:
            raise not_causal()
        if not in_order:
            raise InvalidArgument(
                "position_ids: a QuantizedCache counts the tokens of each sequence from 0; leave"
                " them out"
            )
        return bool(whole)

    def _check_other_mask(self, mask: Tensor | None, tokens: _Tokens, length: int) -> None:
        """Models with windows in some layers have two masks; each is checked once per forward."""
        if any(mask is known for known in self._masks):
            return
        new = tokens.real[:, -length:]
        if mask is not None:
            check_form(mask, new.shape[0], length, tokens.real.shape[1])
        if not bool(is_causal(mask, tokens.real, new)):
            raise not_causal()
        self._masks.append(mask)

    def _commit(self, real: Tensor) -> None:
        """Let ``real`` be the columns seen. A forward calls it at its end: if one stops on the way,
        what it wrote lies behind the tokens that count.
        """
        self._real, self._tokens, self._masks = real, None, []
        for layer in self.layers:
            layer.seen = real.shape[1]

    def reset(self) -> None:
        """Forget every token; the allocated store is used again if as many sequences follow."""
        for layer in self.layers:
            layer.reset()
        self._real, self._tokens, self._masks = None, None, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, int64 [n], in that order."""
        if self._real is None:
            return
        self._real = self._real.index_select(0, indices.to(self._real.device))
        for layer in self.layers:
            layer.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, one behind the other."""
        if self._real is not None:
            rows = torch.arange(len(self._real), device=self._real.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns, padding included, or all if there are
        fewer; a positive number is what remains.
        """
        seen = self.layers[0].seen
        removed = seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if self._real is not None and removed > 0:
            self._commit(self._real[:, : max(seen - removed, 0)])


class CachedAttention(nn.Module):
    """What an attention module becomes: with a :class:`QuantizedCache` it hands on what its
    projections gave; otherwise it is the class it was.
    """

    made_for: tuple[Any, ...]
    """:attr:`QuantizedCache.made_for` of its model; a tuple, so that a copied model keeps it."""

    def forward(
        self, hidden_states: Any, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the class below: hidden states [B, T, K] -> [B, T, K] and no attention weights.

        Raises:
            ConfigError: a cache of another model, and what :meth:`QuantizedCache.attend` raises.
        """
        if not isinstance(past_key_values, QuantizedCache):
            return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        a: Any = self
        if a.layer_idx == 0:
            past_key_values.check_model(self.made_for, a.config.num_hidden_layers)
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


def _connect(attention: nn.Module, made_for: tuple[Any, ...]) -> None:
    cls = type(attention)
    if not isinstance(attention, CachedAttention):
        if cls not in _CLASSES:
            _CLASSES[cls] = type(f"Cached{cls.__name__}", (CachedAttention, cls), {})
        cls = _CLASSES[cls]
    qnn.become(attention, cls, made_for=made_for)


def _rotation(model: Any) -> tuple[float, ...]:
    """cos and sin [D / 2] of position 1: all other positions follow from them."""
    # always from a table of two positions: a longer one may round the same angle otherwise
    tables = rotary_tables(model.model.rotary_emb, 2, model.model.embed_tokens.weight.device)
    return tuple(torch.cat([table[1] for table in tables]).tolist())


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
