"""The engine's interface over a model's own forward in transformers, for families whose blocks the
engine has no code for (GPT-2): slower, but every command that writes tokens works.

Sequences run in batches: prompts are padded on the left, a sequence that ends leaves its batch, and
the next batch begins when all have ended. Sampling is the engine's (spec 15, 16), so a record is
the same in both up to near ties of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmqat.errors import ConfigError
from llmqat.models.families import find_family
from llmqat.runtime.engine import Engine
from llmqat.runtime.sampling import Sampler, Sampling
from llmqat.runtime.scheduler import Active, Completion, Request, check_request
from llmqat.runtime.support import default_max_len, has_engine
from llmqat.runtime.token_engine import TokenEngine
from llmqat.state import state_of
from llmqat_kernels.errors import InvalidArgument


class TransformersEngine(TokenEngine):
    """Runs a causal language model of a supported family: plain, prepared or converted.

    The model quantizes keys and values itself, as in training and evaluation; its cache holds
    floats.

    Args:
        model: is used as it is, not copied.
        max_slots: sequences of one batch.
        max_len: tokens per sequence, at most the model's positions; None takes 2048 or, if fewer,
            those.

    Raises:
        InvalidArgument: sizes out of range. ConfigError: a model of no supported family.
    """

    def __init__(self, model: nn.Module, *, max_slots: int = 1, max_len: int | None = None) -> None:
        if max_slots < 1:
            raise InvalidArgument(f"max_slots: {max_slots} must be at least 1")
        find_family(model)
        positions: int = model.config.max_position_embeddings
        self.max_len = default_max_len(model) if max_len is None else max_len
        if not 1 <= self.max_len <= positions:
            raise InvalidArgument(
                f"max_len: {self.max_len} is outside 1..{positions} (model positions)"
            )
        state = state_of(model)
        self.model = model.eval()
        self.max_slots = max_slots
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.kv_bits = 16 if state is None else min(state.config.kv_bits, 16)
        self.kv_mode = "paper" if state is None else state.config.kv_mode
        self.dtype, self.device = model.dtype, model.device

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of all parameters and buffers; a tied tensor counts once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return {"model": sum(tensor.nbytes for tensor in tensors)}

    @property
    def cache_bytes(self) -> int:
        """Bytes of the float KV cache of a full batch."""
        config = self.model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        tokens = self.max_slots * self.max_len
        return 2 * config.num_hidden_layers * width * tokens * self.dtype.itemsize

    def backends(self) -> dict[str, str]:
        """One entry: transformers runs the forward."""
        return {"forward": "transformers"}

    def run(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[list[Completion]]:
        """As :meth:`TokenEngine.run`.

        Raises:
            InvalidArgument: a request whose prompt is empty, holds a token outside the vocabulary,
                or does not fit its ``max_len`` or the engine's.
        """
        sampler, stops = Sampler(sampling, self.device), frozenset(stop_ids)
        waiting = iter(requests)
        while some := list(islice(waiting, self.max_slots)):
            for request in some:
                check_request(request, self.max_len, self.vocab_size)
            full = [request for request in some if len(request.prompt) == request.max_len]
            if full:
                yield [Completion(request, list(request.prompt), "length") for request in full]
            batch = _Batch(self.model, [request for request in some if request not in full])
            while batch.rows:
                tokens = batch.step(sampler)
                if on_step is not None:
                    on_step(len(tokens))
                if ended := batch.take(tokens, stops, on_token):
                    yield ended


class _Batch:
    """Sequences that run together. ``_ids`` int64 [n, new columns] is the next input, ``_mask``
    int64 [n, all columns] is 0 on the padding.
    """

    def __init__(self, model: nn.Module, requests: Sequence[Request]) -> None:
        self.rows = [Active(request, slot) for slot, request in enumerate(requests)]
        self._model, self._cache = model, DynamicCache(config=model.config)
        width = max((len(request.prompt) for request in requests), default=0)
        padding = [width - len(request.prompt) for request in requests]
        ids = [[0] * pad + list(r.prompt) for pad, r in zip(padding, requests, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        self._ids, self._mask = (
            torch.tensor(rows, dtype=torch.int64, device=model.device) for rows in (ids, mask)
        )

    @torch.inference_mode()
    def step(self, sampler: Sampler) -> list[int]:
        """One more token for every sequence."""
        rows = self.rows
        return sampler(
            self._logits(),
            [row.request.record for row in rows],
            [row.planned for row in rows],
            [row.greedy for row in rows],
        )

    def _logits(self) -> Tensor:
        """[n, V] after the last token of each."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        done = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return done.logits[:, -1]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def take(
        self,
        tokens: Sequence[int],
        stops: frozenset[int],
        on_token: Callable[[int, int], None] | None,
    ) -> list[Completion]:
        """Add the chosen tokens; the sequences that ended with them leave."""
        ended = []
        for row, token in zip(self.rows, tokens, strict=True):
            row.reason = row.choose(token, stops)
            row.planned = len(row.tokens)
            if on_token is not None and row.reason != "error":
                on_token(row.request.record, token)
            if row.reason is not None:
                ended.append(Completion(row.request, row.tokens, row.reason))
        kept = [i for i, row in enumerate(self.rows) if row.reason is None]
        device = self._mask.device
        if ended and kept:
            places = torch.tensor(kept, dtype=torch.int64, device=device)
            self._cache.batch_select_indices(places)
            self._mask = self._mask.index_select(0, places)
        self.rows = [self.rows[i] for i in kept]
        last = [[row.tokens[-1]] for row in self.rows]
        self._ids = torch.tensor(last, dtype=torch.int64, device=device)
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(self._mask), 1))], 1)
        return ended


def open_engine(
    model: nn.Module,
    *,
    max_slots: int,
    max_len: int,
    kv_bits: int | None = None,
    kv_mode: str | None = None,
    head_bits: int = 16,
    graphs: bool | None = None,
) -> TokenEngine:
    """The engine for `model`; :class:`TransformersEngine` where there is none for its family.

    Raises:
        ConfigError: options that only the engine has.
    """
    if has_engine(find_family(model)):
        return Engine(
            model,
            max_slots=max_slots,
            max_len=max_len,
            kv_bits=kv_bits,
            kv_mode=kv_mode,
            head_bits=head_bits,
            graphs=graphs,
        )
    stand_in = TransformersEngine(model, max_slots=max_slots, max_len=max_len)
    if kv_bits not in (None, stand_in.kv_bits):
        raise ConfigError(
            f"kv_bits: {kv_bits} needs the engine, which does not run"
            f" {type(model).__name__}; leave it out for the model's own {stand_in.kv_bits}"
        )
    if head_bits != 16:
        raise ConfigError(
            f"head_bits: {head_bits} needs the engine, which does not run {type(model).__name__}"
        )
    return stand_in
