"""One pass of tokens through the model, in operators of ``llmqat_kernels`` alone.

Their kernels are looked up once, for the backend in force (the weights are in that backend's
layout), so a pass is a short list of calls: per block with quantized activations

    rms_norm_quantize(+residual) > qkv > rope_quantize_append > rope(q) > attention_decode
    > quantize > o > rms_norm_quantize(+residual) > gate_up > silu_mul_quantize > down

A backend with kernels for the operators of ``JOINED`` runs those instead; the bits are the same.
On the CPU these blocks are one native call (``fused``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, repeat
from types import SimpleNamespace

import torch
from torch import Tensor

from llmqat.runtime.fused import FusedBlocks, Rows, fused_kernel
from llmqat.runtime.weights import Block, FusedLinear, ModelWeights
from llmqat_kernels import KVCache
from llmqat_kernels.backends.composite import COMPOSITES
from llmqat_kernels.dispatch import resolve

OPERATORS = (
    "quantize",
    "fake_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
    "repacked_matmul",
    "integer_group_matmul",
    "repacked_linear",
    "float_matmul",
    "rope",
    "rope_quantize_append",
    "attention_decode",
)

JOINED = (
    "rope_quantize_append_queries",
    "attention_decode_quantize",
    "repacked_matmul_silu_mul",
    "repacked_matmul_add",
    "repacked_linear_add",
)
"""Pairs of operators as one, used where a backend has a kernel for it."""

Step = Callable[[Tensor, Tensor | None, Rows], tuple[Tensor, Tensor | None]]
"""(stream [n, H], what is to be added to it, rows) -> the same two after some blocks."""


class Forward:
    """The blocks, the final norm and the head of one model on one backend.

    Args:
        caches: one KV cache per block, written in place.
        dtype: of the activations. backend: as for ``llmqat_kernels.use_backend``.
        fuse: run neighbouring blocks with quantized activations as one native call where there is
            one; the same bits.
    """

    def __init__(
        self,
        weights: ModelWeights,
        caches: Sequence[KVCache],
        dtype: torch.dtype,
        backend: str,
        *,
        fuse: bool = True,
    ) -> None:
        self.weights, self.dtype = weights, dtype
        device = weights.embedding.device.type
        choices = {op: resolve(op, device, backend) for op in OPERATORS}
        joined = {op: resolve(op, device, backend) for op in JOINED}
        self._joined = {op for op in JOINED if joined[op].kernel is not COMPOSITES[op]}
        choices |= {op: joined[op] for op in self._joined}
        self.backends = {op: choice.backend for op, choice in choices.items()}
        self.kernels = SimpleNamespace(**{op: choice.kernel for op, choice in choices.items()})
        self._heads = (weights.heads, weights.kv_heads, weights.kv_heads)
        self._halves = (weights.blocks[0].gate_up.n // 2,) * 2
        fused = fused_kernel(self.backends) if fuse else None
        self._steps = list(self._plan(caches, fused))

    def _plan(self, caches: Sequence[KVCache], fused: Callable[..., None] | None) -> Iterator[Step]:
        """The blocks as steps."""
        if self.weights.blocks[0].head_norms is not None:
            fused = None  # the native call has no norms of heads
        pairs = zip(self.weights.blocks, caches, strict=True)
        for integer, group in groupby(pairs, lambda pair: pair[0].integer_bits is not None):
            blocks, own = zip(*group, strict=True)
            if integer and fused is not None:
                yield FusedBlocks(fused, blocks, own, self.weights)
            else:
                step = self._integer_block if integer else self._float_block
                yield from map(partial, repeat(step), blocks, own)

    @property
    def fused(self) -> bool:
        """Whether some blocks run as one native call."""
        return any(isinstance(step, FusedBlocks) for step in self._steps)

    def __call__(
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """tokens, slots, positions int64 [n] -> the residual stream [n, H] after the last block: a
        fixed sequence of operators, whatever n is. ``lengths``: ``positions + 1`` where it exists;
        ``longest``: the largest of them where the host knows it.
        """
        rows = Rows(slots, positions, positions + 1 if lengths is None else lengths, longest)
        stream = self.weights.embedding.index_select(0, tokens).to(self.dtype)
        delta: Tensor | None = None
        for step in self._steps:
            stream, delta = step(stream, delta, rows)
        return stream if delta is None else stream + delta

    def _integer_block(
        self, block: Block, cache: KVCache, stream: Tensor, delta: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """One block whose linears all take codes; returns the stream and what is to be added to
        it.
        """
        kernels, bits = self.kernels, block.qkv.a_bits
        codes, scale, total = kernels.rms_norm_quantize(
            stream, block.input_norm, block.input_eps, bits, delta
        )
        stream = stream if delta is None else total
        q = self._append(block, cache, self.integer(block.qkv, codes, scale), rows)
        if "attention_decode_quantize" in self._joined:
            codes, scale = self._attend_quantize(cache, q, rows, bits)
        else:
            codes, scale = kernels.quantize(self._attend(cache, q, rows), bits, -1, False)
        stream, delta = self._add_integer(stream, block.o, codes, scale)
        codes, scale, total = kernels.rms_norm_quantize(
            stream, block.post_norm, block.post_eps, bits, delta
        )
        stream = stream if delta is None else total
        if "repacked_matmul_silu_mul" in self._joined and block.gate_up.multiplier is None:
            product = self.integer(block.gate_up, codes, scale, kernels.repacked_matmul_silu_mul)
            codes, scale = kernels.quantize(product, bits, -1, False)
        else:
            product = self.integer(block.gate_up, codes, scale)
            gate, up = product.split_with_sizes(self._halves, 1)
            codes, scale = kernels.silu_mul_quantize(gate, up, bits)
        return self._add_integer(stream, block.down, codes, scale)

    def _float_block(
        self, block: Block, cache: KVCache, stream: Tensor, delta: Tensor | None, rows: Rows
    ) -> tuple[Tensor, None]:
        """One block of which at least one linear takes floats."""
        kernels = self.kernels
        if delta is not None:
            stream = stream + delta
        normed = kernels.rms_norm(stream, block.input_norm, block.input_eps)
        q = self._append(block, cache, self.linear(block.qkv, normed), rows)
        stream = self._add(stream, block.o, self._attend(cache, q, rows))
        normed = kernels.rms_norm(stream, block.post_norm, block.post_eps)
        gate, up = self.linear(block.gate_up, normed).split_with_sizes(self._halves, 1)
        return self._add(stream, block.down, kernels.silu_mul(gate, up)), None

    def _append(self, block: Block, cache: KVCache, qkv: Tensor, rows: Rows) -> Tensor:
        """Write K and V of the rows: qkv [n, (H + 2 Hkv) D] -> rotated queries [n, H, D]."""
        kernels, weights = self.kernels, self.weights
        cos, sin = weights.cos, weights.sin
        q, k, v = qkv.view(qkv.shape[0], -1, weights.head_dim).split_with_sizes(self._heads, 1)
        if block.head_norms is not None:
            q, k = (
                kernels.rms_norm(heads.contiguous(), weight, block.head_eps)
                for heads, weight in zip((q, k), block.head_norms, strict=True)
            )
        held = (cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale)
        places = (rows.slots, rows.positions, cache.bits, cache.pre_rope)
        if "rope_quantize_append_queries" in self._joined:
            append = kernels.rope_quantize_append_queries
            return append(q, k, v, cos, sin, *held, None, *places)  # type: ignore[no-any-return]
        kernels.rope_quantize_append(k, v, cos, sin, *held, *places)
        return kernels.rope(q, cos, sin, rows.positions)  # type: ignore[no-any-return]

    def _attend(self, cache: KVCache, q: Tensor, rows: Rows) -> Tensor:
        """Attention of rotated queries [n, H, D] -> [n, H D]."""
        weights = self.weights
        mixed = self.kernels.attention_decode(
            q,
            cache.k_codes,
            cache.k_scale,
            cache.v_codes,
            cache.v_scale,
            weights.cos,
            weights.sin,
            rows.slots,
            rows.lengths,
            weights.scaling,
            cache.bits,
            cache.pre_rope,
        )
        return mixed.view(q.shape[0], -1)  # type: ignore[no-any-return]

    def _attend_quantize(
        self, cache: KVCache, q: Tensor, rows: Rows, bits: int
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_attend`, then the codes of it and their scales."""
        weights = self.weights
        _, codes, scale = self.kernels.attention_decode_quantize(
            q,
            cache.k_codes,
            cache.k_scale,
            cache.v_codes,
            cache.v_scale,
            None,
            weights.cos,
            weights.sin,
            rows.slots,
            rows.lengths,
            rows.longest or cache.k_codes.shape[2],  # no length is beyond the cache
            weights.scaling,
            cache.bits,
            cache.pre_rope,
            bits,
        )
        return codes, scale

    def logits(self, stream: Tensor) -> Tensor:
        """The final norm and the head: [n, H] -> [n, V]."""
        normed = self.kernels.rms_norm(stream, self.weights.norm, self.weights.norm_eps)
        return self.linear(self.weights.head, normed)

    def greedy(self, stream: Tensor) -> Tensor:
        """The greedy token of every row (spec 16) by the head's screen: [n, H] -> int64 [n]."""
        weights = self.weights
        normed = self.kernels.rms_norm(stream, weights.norm, weights.norm_eps)
        return weights.head_screen.greedy(normed, weights.head.weight)  # type: ignore[union-attr]

    def integer(
        self,
        linear: FusedLinear,
        codes: Tensor,
        scale: Tensor,
        kernel: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The integer product of spec 7 or 18 on codes int8 [n, K] and scales [n]; ``kernel`` None
        is ``repacked_matmul``, or what reads integer group scales.
        """
        if linear.multiplier is not None:
            return self.kernels.integer_group_matmul(  # type: ignore[no-any-return]
                codes,
                scale,
                linear.weight,
                linear.multiplier,
                linear.scale,
                linear.bias,
                linear.group_size,
                self.dtype,
            )
        return (kernel or self.kernels.repacked_matmul)(  # type: ignore[no-any-return]
            codes, scale, *linear.held, *linear.form, self.dtype
        )

    def float(self, linear: FusedLinear, x: Tensor) -> Tensor:
        """The float product of spec 17, of a float weight or of the values of codes."""
        if linear.scale is not None:
            return self.kernels.repacked_linear(x, *linear.held, *linear.form)  # type: ignore[no-any-return]
        return self.kernels.float_matmul(x, linear.weight, linear.bias, linear.n)  # type: ignore[no-any-return]

    def _add_integer(
        self, stream: Tensor, linear: FusedLinear, codes: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The stream with :meth:`integer` added, or the two for the next norm to add."""
        if "repacked_matmul_add" not in self._joined or linear.multiplier is not None:
            return stream, self.integer(linear, codes, scale)
        add = self.kernels.repacked_matmul_add
        return add(codes, scale, *linear.held, stream, *linear.form), None

    def _add(self, stream: Tensor, linear: FusedLinear, x: Tensor) -> Tensor:
        """The stream plus :meth:`linear`."""
        if "repacked_linear_add" not in self._joined or linear.integer or linear.scale is None:
            return stream + self.linear(linear, x)
        add = self.kernels.repacked_linear_add
        return add(self._input(linear, x), *linear.held, stream, *linear.form)  # type: ignore[no-any-return]

    def _input(self, linear: FusedLinear, x: Tensor) -> Tensor:
        """What a float product multiplies: x, fake-quantized for a weight that is not."""
        if linear.a_bits >= 16:
            return x
        return self.kernels.fake_quantize(x, linear.a_bits, -1, None, False)  # type: ignore[no-any-return]

    def linear(self, linear: FusedLinear, x: Tensor) -> Tensor:
        """Any linear on float input."""
        if linear.integer:
            return self.integer(linear, *self.kernels.quantize(x, linear.a_bits, -1, False))
        return self.float(linear, self._input(linear, x))
