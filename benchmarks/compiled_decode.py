"""A small, fast decoder in plain torch, as one writes it today: what the engine is compared with.

A static bf16 KV cache, fused q, k, v and gate, up, one compiled function for a decoder block (the
same for every block, so it compiles once), the whole step in one CUDA graph, greedy tokens. Weights
in bf16, or in 4 bits by torch's own weight-only GEMM (``tinygemm``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmqat_kernels as qk
from benchmarks import tinygemm
from benchmarks.cuda import captured

Weight = Tensor | tuple[Tensor, Tensor]
"""bf16 [N, K], or packed codes and their scales."""


def product(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] times a weight in either form."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    return tinygemm.linear(*weight, x.shape[-1])(x)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, H, D] at one position: cos, sin [D / 2]."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@dataclass(frozen=True)
class Block:
    """Weights and caches [B, Hkv, T, D] of one decoder block."""

    norm: Tensor
    qkv: Weight
    o: Weight
    post_norm: Tensor
    gate_up: Weight
    down: Weight
    keys: Tensor
    values: Tensor


def block_step(
    x: Tensor, block: Block, cos: Tensor, sin: Tensor, position: Tensor, mask: Tensor, dim: int,
    eps: float,
) -> Tensor:  # fmt: skip
    """One token of every sequence through one block: x [B, H] -> [B, H]."""
    batch, width = x.shape
    kv_heads = block.keys.shape[1]
    heads = width // dim
    qkv = product(F.rms_norm(x, (width,), block.norm, eps), block.qkv).view(batch, -1, dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    block.keys.index_copy_(2, position, rotated(k, cos, sin).unsqueeze(2))
    block.values.index_copy_(2, position, v.unsqueeze(2))
    mixed = F.scaled_dot_product_attention(
        rotated(q, cos, sin).unsqueeze(2), block.keys, block.values, attn_mask=mask,
        enable_gqa=heads != kv_heads,
    )  # fmt: skip
    x = x + product(mixed.reshape(batch, width), block.o)
    gate, up = product(F.rms_norm(x, (width,), block.post_norm, eps), block.gate_up).chunk(2, -1)
    return x + product(F.silu(gate) * up, block.down)


def int4_weight(weight: Tensor) -> Weight:
    """Round-to-nearest 4-bit codes in tinygemm's layout."""
    return tinygemm.pack(*qk.quantize(weight, 4))


class PlainDecoder:
    """Greedy decoding of ``batch`` sequences that stand at the same position.

    Args:
        model: a plain LLaMA of transformers in bf16.
        int4: 4-bit linears of the blocks; embedding and head stay.
        compiles: torch.compile the block, and capture the step where there is CUDA.
    """

    def __init__(
        self, model: nn.Module, batch: int, max_len: int, *, int4: bool, compiles: bool
    ) -> None:
        config, base = model.config, model.model
        self.embedding, self.norm = base.embed_tokens.weight, base.norm.weight
        self.head, self.eps = model.lm_head.weight, config.rms_norm_eps
        self.device = self.embedding.device
        self.dim = config.hidden_size // config.num_attention_heads
        stored: Callable[[Tensor], Weight] = int4_weight if int4 else Tensor.clone
        shape = (batch, config.num_key_value_heads, max_len, self.dim)

        def fused(*modules: nn.Module) -> Weight:
            return stored(torch.cat([module.weight for module in modules]))

        def cache() -> Tensor:
            return torch.zeros(shape, dtype=self.embedding.dtype, device=self.device).normal_()

        self.blocks = [
            Block(
                layer.input_layernorm.weight,
                fused(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                fused(layer.self_attn.o_proj),
                layer.post_attention_layernorm.weight,
                fused(layer.mlp.gate_proj, layer.mlp.up_proj),
                fused(layer.mlp.down_proj),
                cache(),
                cache(),
            )
            for layer in base.layers
        ]
        places = torch.arange(max_len, device=self.device)
        self._places = places
        cos, sin = base.rotary_emb(self.embedding, places.unsqueeze(0))
        half = self.dim // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._block: Callable[..., Tensor] = block_step
        self._compiles = compiles
        if compiles:
            self._block = torch.compile(
                block_step, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs"
            )
        self._replay: Callable[[], Any] | None = None

    @torch.inference_mode()
    def start(self, tokens: list[int], position: int) -> None:
        """The fresh token of every sequence, and where it stands."""
        self.tokens.copy_(torch.tensor(tokens, device=self.device))
        self.position.fill_(position)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token of every sequence, int64 [B]; overwritten by the next step."""
        if self._replay is None:
            here = self.tokens.clone(), self.position.clone()
            replay: Callable[[], Any] = self._step
            if self._compiles and self.device.type == "cuda":
                for _ in range(2):
                    self._step()
                replay, how = captured(self._step)
                if how != "graph":
                    raise RuntimeError("the step cannot be captured as a CUDA graph")
            self._replay = replay
            self.tokens.copy_(here[0])
            self.position.copy_(here[1])
        self._replay()
        return self.tokens

    def _step(self) -> None:
        cos, sin = (table[self.position][0] for table in (self._cos, self._sin))
        mask = (self._places <= self.position).view(1, 1, 1, -1)
        x = self.embedding[self.tokens]
        # As compiled: a masked sum that the compiler writes itself beats the kernels, which do not
        # split the context of a single query.
        plain = sdpa_kernel(SDPBackend.MATH) if self._compiles else nullcontext()
        with plain:
            for block in self.blocks:
                x = self._block(x, block, cos, sin, self.position, mask, self.dim, self.eps)
        x = F.rms_norm(x, (x.shape[-1],), self.norm, self.eps)
        self.tokens.copy_(F.linear(x, self.head).argmax(-1))
        self.position.add_(1)
