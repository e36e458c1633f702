"""The runtime engine: prefill and decode over a quantized KV cache, without transformers' forward.

A row of a step is one token of one slot. A row's result does not depend on the other rows on the
CPU (integer products are exact, float products and attention go row by row: spec 7, 9, 17), so
batching, order and slot never change a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llmqat.config import KV_MODES, PACKED_KV_BITS
from llmqat.errors import ConfigError
from llmqat.models.families import find_family
from llmqat.runtime.forward import OPERATORS, Forward
from llmqat.runtime.graphs import DecodePlan, StaticDecode, make_plan
from llmqat.runtime.sampling import Sampling
from llmqat.runtime.scheduler import Completion, Request, run_requests
from llmqat.runtime.screen import SCREEN_ROWS
from llmqat.runtime.support import check_cache, default_max_len
from llmqat.runtime.token_engine import TokenEngine
from llmqat.runtime.transfer import upload
from llmqat.runtime.weights import can_screen, extract
from llmqat_kernels import KVCache, current_backend
from llmqat_kernels.dispatch import resolve
from llmqat_kernels.errors import InvalidArgument

ROWS_PER_PASS = 256
"""Rows of one pass through the blocks: bounds the activations of a long prompt, amortizes reading
the weights.
"""


class Engine(TokenEngine):
    """Runs a LLaMA-family model of transformers: plain, prepared or converted
    (``llmqat.from_pretrained``).

    Args:
        model: its weights are copied into the backend's layout (except an embedding that needs no
            change); the model is not changed and may be dropped afterwards.
        max_slots: sequences that run at one time.
        max_len: tokens per sequence, at most the model's positions and sliding window; None takes
            2048 or, if fewer, those.
        kv_bits: 4, 8 or 16; None takes the model's own setting (16 for a plain model).
        kv_mode: ``paper`` or ``serving``; None takes the model's own setting (``paper`` for a plain
            model).
        dtype: of the activations; None takes the model's.
        weight_dtype: storage of float weights; None keeps the model's, as bf16 where that is
            lossless.
        head_bits: 16 keeps the head as it is; 8 quantizes it and its input to 8 bits (approximate:
            the method leaves the head alone).
        fuse: run neighbouring blocks as one native call where there is one; the same bits.
        screen_head: keep an 8-bit screen beside a float head, so that greedy tokens read about half
            of its bytes; the same tokens. None does so for heads of at least 8192 rows that can
            have one: finite, without a bias, on the ``cpu`` backend.
        graphs: replay decode steps as CUDA graphs; None does so on CUDA where every operator has a
            kernel. Then the cache has one slot more, unless ``max_slots`` is at most 3.

    Raises:
        ConfigError: an unsupported model or KV setting, ``screen_head`` for a head that cannot have
            a screen, or ``graphs`` where there are none. InvalidArgument: sizes out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_slots: int = 1,
        max_len: int | None = None,
        kv_bits: int | None = None,
        kv_mode: str | None = None,
        dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        head_bits: int = 16,
        fuse: bool = True,
        screen_head: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        if not isinstance(max_slots, int) or max_slots < 1:
            raise InvalidArgument(f"max_slots: {max_slots} must be an integer of at least 1")
        family = find_family(model)
        if max_len is None:
            max_len = default_max_len(model)
        if weight_dtype not in (None, torch.float32, torch.bfloat16):
            raise InvalidArgument(f"weight_dtype: {weight_dtype} is not float32, bfloat16 or None")
        self.dtype: torch.dtype = model.dtype if dtype is None else dtype  # type: ignore[assignment]
        with torch.inference_mode():
            self.weights = extract(
                model,
                max_len=max_len,
                dtype=self.dtype,
                weight_dtype=weight_dtype,
                head_bits=head_bits,
                screen_head=_wants_screen(model, head_bits, screen_head),
            )
        weights, quantization = self.weights, self.weights.quantization
        self.device = weights.embedding.device
        self.max_slots: int = max_slots
        self.vocab_size: int = weights.head.n
        self.backend = current_backend()
        self._family, self._fuse = family, fuse
        used = {
            op: resolve(op, self.device.type, self.backend).backend for op in (*OPERATORS, "sample")
        }
        self._plan = make_plan(self.device, used, graphs)
        self.replace_cache(
            max_len=max_len,
            kv_bits=min(quantization.kv_bits if kv_bits is None else kv_bits, 16),
            kv_mode=quantization.kv_mode if kv_mode is None else kv_mode,
        )

    def replace_cache(
        self,
        *,
        max_len: int,
        kv_bits: int | None = None,
        kv_mode: str | None = None,
        plan: DecodePlan | None = None,
    ) -> None:
        """An empty KV cache of another length, width or mode; every sequence is forgotten.

        Args:
            max_len: tokens per sequence, at most those of the rotary tables: the constructor's.
            kv_bits, kv_mode: as of the constructor; None keeps the present ones.
            plan: how decode steps run from now on; None keeps it.

        Raises:
            ConfigError: an unsupported KV setting. InvalidArgument: ``max_len``.
        """
        weights = self.weights
        if not 1 <= max_len <= weights.cos.shape[0]:
            raise InvalidArgument(f"max_len: {max_len} is outside 1..{weights.cos.shape[0]}")
        self.max_len = max_len
        if kv_bits is not None:
            self.kv_bits: int = kv_bits
        if kv_mode is not None:
            self.kv_mode: str = kv_mode
        if self.kv_bits not in PACKED_KV_BITS:
            raise ConfigError(f"kv_bits: {self.kv_bits} has no packed KV cache; use 4, 8 or 16")
        if self.kv_mode not in KV_MODES:
            raise ConfigError(
                f"kv_mode: {self.kv_mode!r} is not supported; use {' or '.join(KV_MODES)}"
            )
        check_cache(self._family, self.kv_bits, self.kv_mode)
        self._plan = self._plan if plan is None else plan
        for name in ("_caches", "forward", "static"):  # they hold the old cache: free it first
            vars(self).pop(name, None)
        scratch = self._plan.scratch_slots(self.max_slots)
        self._caches = [
            KVCache.allocate(
                self.max_slots + scratch,
                weights.kv_heads,
                max_len,
                weights.head_dim,
                bits=self.kv_bits,
                mode=self.kv_mode,
                device=self.device,
                dtype=self.dtype,
            )
            for _ in weights.blocks
        ]
        self._lengths = [0] * self.max_slots
        self.user: object | None = None  # the run that the slots belong to
        self.forward = Forward(weights, self._caches, self.dtype, self.backend, fuse=self._fuse)
        self.static = StaticDecode(
            self.forward,
            self.max_slots,
            self._plan,
            scratch=self.max_slots if scratch else None,
            screens=self.screens,
        )

    # What it holds

    @property
    def plan(self) -> DecodePlan:
        """How decode steps run."""
        return self._plan

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights by kind: linears, head, embedding, norms, head screen."""
        return self.weights.nbytes()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the whole KV cache, codes and scales."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def caches(self) -> list[KVCache]:
        """The KV cache of every block."""
        return self._caches

    def backends(self) -> dict[str, str]:
        """Which backend runs each operator."""
        return self.forward.backends

    # Sequences

    def length(self, slot: int) -> int:
        """Tokens that ``slot`` holds."""
        return self._lengths[slot]

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Forget the sequences of ``slots`` (all by default). Nothing is erased: lengths alone say
        what is visible.
        """
        self.user = None
        for slot in range(self.max_slots) if slots is None else slots:
            self._lengths[slot] = 0

    def assume_length(self, slot: int, length: int) -> None:
        """Say that ``slot`` holds ``length`` tokens, for a cache that was written from outside."""
        self._check_slots([slot])
        if not 0 <= length <= self.max_len:
            raise InvalidArgument(f"length: {length} is outside 0..{self.max_len}")
        self.user = None
        self._lengths[slot] = length

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start new sequences: logits [n, V] after each prompt's last token, in the engine's dtype.

        Raises:
            InvalidArgument: an empty prompt, one longer than ``max_len``, a token outside the
                vocabulary, a slot that does not exist or stands twice.
        """
        self._check_slots(slots)
        self.reset(slots)
        return self.extend(slots, prompts)

    def decode(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """One more token for each of ``slots``: logits [n, V] after it. Errors as
        :meth:`prefill`.
        """
        return self.extend(slots, [(token,) for token in tokens])

    @torch.inference_mode()
    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append ``tokens[i]`` to ``slots[i]``: logits [n, V] after the last of each. Errors as
        :meth:`prefill`.
        """
        return self.forward.logits(self.append(slots, tokens))

    @property
    def screens(self) -> bool:
        """Whether the head has a screen: :meth:`extend_greedy` runs."""
        return self.weights.head_screen is not None

    @torch.inference_mode()
    def extend_greedy(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[int]:
        """As :meth:`extend`, but the first index of each row's largest logit (spec 16; -1 where
        there is none), without the logits.

        Raises:
            InvalidArgument: as :meth:`prefill`, and from an engine that does not screen its head.
        """
        if not self.screens:
            raise InvalidArgument("screen_head: this engine has no screen of its head; use extend")
        return self.forward.greedy(self.append(slots, tokens)).tolist()  # type: ignore[no-any-return]

    def decoded(self, slots: Iterable[int]) -> None:
        """Count one more token in each of ``slots``, which a static step has written."""
        for slot in slots:
            self._lengths[slot] += 1

    @torch.inference_mode()
    def append(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append ``tokens[i]`` to ``slots[i]``: the residual stream [n, H] of the last of each.
        Errors as :meth:`prefill`.
        """
        self.user = None
        self._check_slots(slots)
        if len(slots) != len(tokens):
            raise InvalidArgument(
                f"tokens: {len(tokens)} sequences for {len(slots)} slots; pass one per slot"
            )
        if not slots:
            width = self.weights.embedding.shape[1]
            return torch.empty((0, width), dtype=self.dtype, device=self.device)
        ids: list[int] = []
        row_slots: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for slot, new in zip(slots, tokens, strict=True):
            begin = self._lengths[slot]
            if not new or begin + len(new) > self.max_len:
                problem = (
                    "is empty"
                    if not new
                    else f"reaches {begin + len(new)} tokens, max_len is {self.max_len}"
                )
                raise InvalidArgument(f"tokens: the sequence of slot {slot} {problem}")
            ids.extend(new)
            row_slots.extend([slot] * len(new))
            positions.extend(range(begin, begin + len(new)))
            last.append(len(ids) - 1)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise InvalidArgument(
                f"tokens: ids must lie in 0..{self.vocab_size - 1}, got {min(ids)}..{max(ids)}"
            )
        hidden = self._passes(ids, row_slots, positions, last)
        for slot, new in zip(slots, tokens, strict=True):
            self._lengths[slot] += len(new)
        return hidden

    def run(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[list[Completion]]:
        """:func:`run_requests` through this engine's slots."""
        return run_requests(
            self, requests, sampling, stop_ids=stop_ids, on_token=on_token, on_step=on_step
        )

    def _check_slots(self, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or (
            slots and not 0 <= min(slots) <= max(slots) < self.max_slots
        ):
            raise InvalidArgument(
                f"slots: {list(slots)[:8]} must be different numbers of 0..{self.max_slots - 1}"
            )

    # The forward pass

    def _passes(
        self, ids: list[int], slots: list[int], positions: list[int], last: list[int]
    ) -> Tensor:
        """The residual stream [len(last), H] of the rows ``last``, in passes of at most
        ROWS_PER_PASS rows.
        """
        if len(ids) <= ROWS_PER_PASS:
            hidden = self._blocks(ids, slots, positions)
            return hidden if len(last) == len(ids) else self._select(hidden, last)
        wanted, kept = set(last), []
        for begin in range(0, len(ids), ROWS_PER_PASS):
            end = min(begin + ROWS_PER_PASS, len(ids))
            hidden = self._blocks(ids[begin:end], slots[begin:end], positions[begin:end])
            rows = [row - begin for row in range(begin, end) if row in wanted]
            kept.append(self._select(hidden, rows))
        return torch.cat(kept)

    def _select(self, hidden: Tensor, rows: list[int]) -> Tensor:
        return hidden.index_select(0, upload(rows, torch.int64, self.device))

    def _blocks(self, ids: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """The residual stream [n, H] after the last block."""
        columns = (upload(values, torch.int64, self.device) for values in (ids, slots, positions))
        return self.forward(*columns, longest=max(positions) + 1)


def _wants_screen(model: nn.Module, head_bits: int, asked: bool | None) -> bool:
    """Whether to make a screen of the head."""
    if asked is False:
        return False
    head = model.lm_head
    backend = resolve("float_matmul", head.weight.device.type, current_backend()).backend
    large = asked or head.weight.shape[0] >= SCREEN_ROWS
    possible = large and backend == "cpu" and can_screen(head, head_bits)
    if asked and not possible:
        raise ConfigError(
            "screen_head: needs the cpu backend and a finite float head without bias; leave it out"
        )
    return possible
