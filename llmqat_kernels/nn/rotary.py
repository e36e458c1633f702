"""Between the projections and attention: rotation, and K and V as a quantized cache gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import llmqat_kernels as qk

from ..checks import check_bits
from ..errors import InvalidArgument, InvalidArgumentType

MODES = ("serving", "paper")


@dataclass(frozen=True)
class QuantizedKV:
    """RoPE on Q and K, fake quantization of K and V (spec 9, 19): what attention over a quantized
    cache sees, for any attention that takes floats.

    Args:
        head_dim: D, even. bits: 2..8, or 16 / 32 to rotate only.
        mode: ``serving`` (K after RoPE, one scale per token and head) or ``paper`` (before RoPE,
            one scale per token).
        ste_clip: gradients are zero where |x| >= ste_clip; None passes all.

    Raises:
        InvalidArgument: an odd head_dim, bits or a mode that do not exist.
    """

    head_dim: int
    bits: int
    mode: str = "serving"
    ste_clip: float | None = None

    def __post_init__(self) -> None:
        check_bits("bits", self.bits, (16, 32))
        if isinstance(self.head_dim, bool) or not isinstance(self.head_dim, int):
            raise InvalidArgumentType(
                f"head_dim: expected an int, got {type(self.head_dim).__name__}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InvalidArgument(
                f"head_dim: {self.head_dim} must be even and positive: RoPE turns pairs"
            )
        if self.mode not in MODES:
            raise InvalidArgument(f"mode: {self.mode!r} is unknown; use one of {', '.join(MODES)}")

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

        Raises:
            InvalidArgument: shapes that do not fit; tables of other positions than these T.
        """
        batch, length = q.shape[:2]
        for name, x in (("q", q), ("k", k), ("v", v)):
            self._check_projection(name, x, (batch, length))
        self._check_tables(cos, sin, batch, length)
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

    def _check_projection(self, name: str, x: Tensor, tokens: tuple[int, int]) -> None:
        if x.dim() != 3 or tuple(x.shape[:2]) != tokens or x.shape[2] % self.head_dim:
            raise InvalidArgument(
                f"{name}: expected [{tokens[0]}, {tokens[1]}, heads * {self.head_dim}], got"
                f" {tuple(x.shape)}"
            )

    def _check_tables(self, cos: Tensor, sin: Tensor, batch: int, length: int) -> None:
        """A longer table would be read at the positions of another sequence."""
        half, shape = self.head_dim // 2, tuple(cos.shape)
        rows = shape[:-1]
        fits = rows in ((length,), (1, length), (batch, length)) and shape[-1] >= half
        if not fits or tuple(sin.shape) != shape:
            raise InvalidArgument(
                f"cos, sin: expected [1 or {batch}, {length}, {half}], got {shape} and"
                f" {tuple(sin.shape)}; slice the tables to the positions of q"
            )
