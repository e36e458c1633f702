"""Between the projections and attention: rotation, and K and V as a quantized cache gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import llmqat_kernels as qk


@dataclass(frozen=True)
class QuantizedKV:
    """RoPE on Q and K, fake quantization of K and V (spec 9, 19): what attention over a quantized
    cache sees, for any attention that takes floats.

    Args:
        head_dim: D, even. bits: 2..8, or 16 / 32 to rotate only.
        mode: ``serving`` (K after RoPE, one scale per token and head) or ``paper`` (before RoPE,
            one scale per token).
        ste_clip: gradients are zero where |x| >= ste_clip; None passes all.
    """

    head_dim: int
    bits: int
    mode: str = "serving"
    ste_clip: float | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the projections -> inputs of `scaled_dot_product_attention`.

        Args:
            q: float [B, T, H D]. k, v: float [B, T, Hkv D].
            cos, sin: [1, T, D / 2], or [B, T, D / 2] where positions differ between sequences;
                further columns (tables that repeat their half) are not read.

        Returns:
            q [B, H, T, D]; k, v [B, Hkv, T, D].
        """
        batch, length = q.shape[:2]
        half = self.head_dim // 2
        cos, sin = (table[..., :half].float().reshape(-1, half) for table in (cos, sin))
        positions = torch.arange(cos.shape[0], device=q.device)
        if cos.shape[0] != batch * length:
            positions = positions.repeat(batch)

        def tokens(x: Tensor) -> Tensor:
            return x.reshape(batch * length, -1, self.head_dim)

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, length, -1, self.head_dim).transpose(1, 2)

        query = qk.rope(tokens(q), cos, sin, positions)
        key, value = qk.rope_fake_quantize(
            tokens(k),
            tokens(v),
            cos,
            sin,
            positions,
            bits=self.bits,
            mode=self.mode,
            ste_clip=self.ste_clip,
        )
        return heads(query), heads(key), heads(value)
