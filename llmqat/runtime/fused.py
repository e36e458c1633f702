"""Several decoder blocks as one native call: on the CPU a step of a small model is otherwise spent
between its operators (eleven a block) rather than in them.

The call runs the same kernels on the same numbers as the composition of operators in ``forward``,
so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.runtime.weights import Block, ModelWeights
from llmqat_kernels import KVCache


def fused_kernel(backends: Mapping[str, str]) -> Callable[..., None] | None:
    """The native operator if every operator of ``backends`` (name -> backend) runs on ``cpu``, else
    None.
    """
    if set(backends.values()) != {"cpu"}:
        return None
    return torch.ops.llmqat_cpu.decoder_blocks.default  # type: ignore[no-any-return]


class Rows(NamedTuple):
    """The rows of one pass: slot, position and visible length of each token, int64 [n] on the
    device; and the largest length where the host knows it, so that scratch memory and grids are as
    large as the sequences, not as the cache.
    """

    slots: Tensor
    positions: Tensor
    lengths: Tensor
    longest: int | None = None


class FusedBlocks:
    """Consecutive blocks whose linears all take codes.

    Args:
        kernel: from :func:`fused_kernel`.
        blocks: each with ``integer_bits``; ``caches`` are theirs, written in place.
        weights: for the RoPE tables and the attention's sizes.
    """

    def __init__(
        self,
        kernel: Callable[..., None],
        blocks: Sequence[Block],
        caches: Sequence[KVCache],
        weights: ModelWeights,
    ) -> None:
        self._kernel = kernel
        linears = [linear for block in blocks for linear in block.linears]
        self._per_block: tuple[list[Any], ...] = (
            [tensor for block in blocks for tensor in _weights(block)],
            [linear.bias for linear in linears],
            [linear.multiplier for linear in linears],
            [t for c in caches for t in (c.k_codes, c.k_scale, c.v_codes, c.v_scale)],
            [eps for block in blocks for eps in (block.input_eps, block.post_eps)],
            [block.integer_bits for block in blocks],
        )
        self._tables = (weights.cos, weights.sin)
        self._attention = (weights.heads, weights.scaling, caches[0].bits, caches[0].pre_rope)

    def __call__(
        self, stream: Tensor, delta: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        """stream [n, H] (overwritten) and what is still to be added to it -> the stream after the
        blocks, and nothing to add.
        """
        if delta is not None:
            stream = stream + delta
        self._kernel(
            stream,
            *self._per_block,
            *self._tables,
            rows.slots,
            rows.positions,
            *self._attention,
        )
        return stream, None


def _weights(block: Block) -> list[Tensor | None]:
    """In the order of ``llmqat_cpu::decoder_blocks``."""
    tensors: list[Tensor | None] = [block.input_norm, block.post_norm]
    for linear in block.linears:
        tensors += [linear.weight, linear.scale]
    return tensors
