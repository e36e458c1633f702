"""The runtime engine: prefill and decode over a quantized KV cache, without transformers' forward.

Only operators of ``llmqat_kernels`` run between the embedding and the logits. Their kernels are
looked up once, for the backend in force when the engine is built (the weights are in that backend's
layout), so a step is a short list of calls: per block with quantized activations

    rms_norm_quantize(+residual) > qkv > rope(q) > rope_quantize_append > attention_decode
    > quantize > o > rms_norm_quantize(+residual) > gate_up > silu_mul_quantize > down

A row of a step is one token of one slot. A row's result does not depend on the other rows on the
CPU (integer products are exact, float products and attention go row by row: spec 7, 9, 17), so
batching, order and slot never change a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from llmqat.config import KV_MODES, PACKED_KV_BITS
from llmqat.errors import ConfigError
from llmqat.models.families import find_family
from llmqat.runtime.sampling import Sampling
from llmqat.runtime.scheduler import Completion, Request, run_requests
from llmqat.runtime.weights import Block, FusedLinear, extract
from llmqat_kernels import KVCache, current_backend
from llmqat_kernels.dispatch import resolve
from llmqat_kernels.errors import InvalidArgument

OPERATORS = (
    "quantize",
    "fake_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
    "repacked_matmul",
    "float_matmul",
    "rope",
    "rope_quantize_append",
    "attention_decode",
)
DEFAULT_MAX_LEN = 2048
ROWS_PER_PASS = 256
"""Rows of one pass through the blocks: bounds the activations of a long prompt, amortizes reading
the weights.
"""


class _Rows:
    """The rows of one pass: slot, position and visible length of each token, int64 [n] on the
    device.
    """

    __slots__ = ("lengths", "positions", "slots")

    def __init__(
        self, slots: Sequence[int], positions: Sequence[int], device: torch.device
    ) -> None:
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self.lengths = self.positions + 1


class Engine:
    """Runs a LLaMA-family model of transformers: plain, prepared or converted
    (``llmqat.from_pretrained``).

    Args:
        model: its weights are copied into the backend's layout (except an embedding that needs no
            change); the model is not changed and may be dropped afterwards.
        max_slots: sequences that run at one time.
        max_len: tokens per sequence, at most the model's positions; None takes 2048 or, if fewer,
            those.
        kv_bits: 4, 8 or 16; None takes the model's own setting (16 for a plain model).
        kv_mode: ``paper`` or ``serving``; None takes the model's own setting (``paper`` for a plain
            model).
        dtype: of the activations; None takes the model's.
        weight_dtype: storage of float weights; None keeps the model's, as bf16 where that is
            lossless.

    Raises:
        ConfigError: an unsupported model or KV setting. InvalidArgument: sizes out of range.
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
    ) -> None:
        if max_slots < 1:
            raise InvalidArgument(f"max_slots: {max_slots} must be at least 1")
        find_family(model)
        if max_len is None:
            max_len = min(DEFAULT_MAX_LEN, model.config.max_position_embeddings)
        if weight_dtype not in (None, torch.float32, torch.bfloat16):
            raise InvalidArgument(f"weight_dtype: {weight_dtype} is not float32, bfloat16 or None")
        self.dtype: torch.dtype = model.dtype if dtype is None else dtype  # type: ignore[assignment]
        with torch.inference_mode():
            self.weights = extract(
                model, max_len=max_len, dtype=self.dtype, weight_dtype=weight_dtype
            )
        weights, quantization = self.weights, self.weights.quantization
        self.device = weights.embedding.device
        self.max_slots: int = max_slots
        self.max_len: int = max_len
        self.vocab_size: int = weights.head.n
        self.kv_bits = min(quantization.kv_bits if kv_bits is None else kv_bits, 16)
        self.kv_mode = quantization.kv_mode if kv_mode is None else kv_mode
        if self.kv_bits not in PACKED_KV_BITS:
            raise ConfigError(f"kv_bits: {self.kv_bits} has no packed KV cache; use 4, 8 or 16")
        if self.kv_mode not in KV_MODES:
            raise ConfigError(
                f"kv_mode: {self.kv_mode!r} is not supported; use {' or '.join(KV_MODES)}"
            )
        self.backend = current_backend()
        self._kernels = SimpleNamespace(
            **{op: resolve(op, self.device.type, self.backend).kernel for op in OPERATORS}
        )
        self._caches = [
            KVCache.allocate(
                max_slots,
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
        self._lengths = [0] * max_slots
        self._steps: list[tuple[Callable[..., tuple[Tensor, Tensor]], Block, KVCache]] = [
            (self._float_block if block.integer_bits is None else self._integer_block, block, cache)
            for block, cache in zip(weights.blocks, self._caches, strict=True)
        ]
        self._halves = (weights.blocks[0].gate_up.n // 2,) * 2
        self._heads = (weights.heads, weights.kv_heads, weights.kv_heads)

    # What it holds

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights by kind: linears, head, embedding, norms."""
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
        return {op: resolve(op, self.device.type, self.backend).backend for op in OPERATORS}

    # Sequences

    def length(self, slot: int) -> int:
        """Tokens that ``slot`` holds."""
        return self._lengths[slot]

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Forget the sequences of ``slots`` (all by default). Nothing is erased: lengths alone say
        what is visible.
        """
        for slot in range(self.max_slots) if slots is None else slots:
            self._lengths[slot] = 0

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
        self._check_slots(slots)
        if len(slots) != len(tokens):
            raise InvalidArgument(
                f"tokens: {len(tokens)} sequences for {len(slots)} slots; pass one per slot"
            )
        if not slots:
            return torch.empty((0, self.vocab_size), dtype=self.dtype, device=self.device)
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
        return self._float(self.weights.head, hidden)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; more prompts than slots wait for a free one.

        Args:
            prompts: token ids; prompt i is record i, which with the seed decides its random
                numbers.
            max_new_tokens: tokens to add at most; ``max_len`` bounds prompt and continuation
                together.
            sampling: None takes the most likely token each time.
            stop_ids: tokens that end a sequence (they are kept).
            on_token: called with (prompt index, token) as tokens are chosen.

        Returns:
            One completion per prompt, in their order.
        """
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens: {max_new_tokens} must be at least 1")
        requests = [
            Request(index, tuple(prompt), min(len(prompt) + max_new_tokens, self.max_len))
            for index, prompt in enumerate(prompts)
        ]
        settings = Sampling(greedy=True) if sampling is None else sampling
        steps = run_requests(self, requests, settings, stop_ids=stop_ids, on_token=on_token)
        return sorted(
            (done for step in steps for done in step),
            key=lambda completion: completion.request.record,
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
        """Normed hidden states [len(last), H] of the rows ``last``, in passes of at most
        ROWS_PER_PASS rows.
        """
        if len(ids) <= ROWS_PER_PASS:
            hidden = self._blocks(ids, slots, positions)
            return self._final_norm(
                hidden if len(last) == len(ids) else hidden[torch.tensor(last, device=self.device)]
            )
        wanted, kept = set(last), []
        for begin in range(0, len(ids), ROWS_PER_PASS):
            end = min(begin + ROWS_PER_PASS, len(ids))
            hidden = self._blocks(ids[begin:end], slots[begin:end], positions[begin:end])
            rows = [row - begin for row in range(begin, end) if row in wanted]
            kept.append(hidden[torch.tensor(rows, dtype=torch.int64, device=self.device)])
        return self._final_norm(torch.cat(kept))

    def _final_norm(self, hidden: Tensor) -> Tensor:
        return self._kernels.rms_norm(hidden, self.weights.norm, self.weights.norm_eps)  # type: ignore[no-any-return]

    def _blocks(self, ids: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """The residual stream [n, H] after the last block."""
        rows = _Rows(slots, positions, self.device)
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)
        stream = self.weights.embedding.index_select(0, tokens).to(self.dtype)
        delta: Tensor | None = None
        for run, block, cache in self._steps:
            stream, delta = run(block, cache, stream, delta, rows)
        return stream if delta is None else stream + delta

    def _integer_block(
        self, block: Block, cache: KVCache, stream: Tensor, delta: Tensor | None, rows: _Rows
    ) -> tuple[Tensor, Tensor]:
        """One block whose linears all take codes; returns the stream and what is to be added to
        it.
        """
        kernels, bits = self._kernels, block.qkv.a_bits
        codes, scale, total = kernels.rms_norm_quantize(
            stream, block.input_norm, block.input_eps, bits, delta
        )
        if delta is not None:
            stream = total
        mixed = self._attend(cache, self._integer(block.qkv, codes, scale), rows)
        codes, scale = kernels.quantize(mixed, bits, -1, False)
        delta = self._integer(block.o, codes, scale)
        codes, scale, stream = kernels.rms_norm_quantize(
            stream, block.post_norm, block.post_eps, bits, delta
        )
        gate, up = self._integer(block.gate_up, codes, scale).split_with_sizes(self._halves, 1)
        codes, scale = kernels.silu_mul_quantize(gate, up, bits)
        return stream, self._integer(block.down, codes, scale)

    def _float_block(
        self, block: Block, cache: KVCache, stream: Tensor, delta: Tensor | None, rows: _Rows
    ) -> tuple[Tensor, Tensor]:
        """One block of which at least one linear takes floats."""
        kernels = self._kernels
        if delta is not None:
            stream = stream + delta
        normed = kernels.rms_norm(stream, block.input_norm, block.input_eps)
        mixed = self._attend(cache, self._linear(block.qkv, normed), rows)
        stream = stream + self._linear(block.o, mixed)
        normed = kernels.rms_norm(stream, block.post_norm, block.post_eps)
        gate, up = self._linear(block.gate_up, normed).split_with_sizes(self._halves, 1)
        return stream, self._linear(block.down, kernels.silu_mul(gate, up))

    def _attend(self, cache: KVCache, qkv: Tensor, rows: _Rows) -> Tensor:
        """Write K and V of the rows, then attend: qkv [n, (H + 2 Hkv) D] -> [n, H D]."""
        kernels, weights = self._kernels, self.weights
        cos, sin = weights.cos, weights.sin
        q, k, v = qkv.view(qkv.shape[0], -1, weights.head_dim).split_with_sizes(self._heads, 1)
        kernels.rope_quantize_append(
            k,
            v,
            cos,
            sin,
            cache.k_codes,
            cache.k_scale,
            cache.v_codes,
            cache.v_scale,
            rows.slots,
            rows.positions,
            cache.bits,
            cache.pre_rope,
        )
        mixed = kernels.attention_decode(
            kernels.rope(q, cos, sin, rows.positions),
            cache.k_codes,
            cache.k_scale,
            cache.v_codes,
            cache.v_scale,
            cos,
            sin,
            rows.slots,
            rows.lengths,
            weights.scaling,
            cache.bits,
            cache.pre_rope,
        )
        return mixed.view(qkv.shape[0], -1)  # type: ignore[no-any-return]

    def _integer(self, linear: FusedLinear, codes: Tensor, scale: Tensor) -> Tensor:
        return self._kernels.repacked_matmul(  # type: ignore[no-any-return]
            codes,
            scale,
            linear.weight,
            linear.scale,
            linear.bias,
            linear.n,
            linear.w_bits,
            linear.group_size,
            self.dtype,
        )

    def _float(self, linear: FusedLinear, x: Tensor) -> Tensor:
        return self._kernels.float_matmul(x, linear.weight, linear.bias, linear.n)  # type: ignore[no-any-return]

    def _linear(self, linear: FusedLinear, x: Tensor) -> Tensor:
        """Any linear on float input."""
        if linear.integer:
            return self._integer(linear, *self._kernels.quantize(x, linear.a_bits, -1, False))
        if linear.a_bits < 16:
            x = self._kernels.fake_quantize(x, linear.a_bits, -1, None, False)
        return self._float(linear, x)
