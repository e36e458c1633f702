"""Public functions on the quantized KV cache: allocation, append, decode attention (spec 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_bits, check_shape, check_tensor
from .errors import InvalidArgument
from .functional.rows import check_clip

ops = torch.ops.llmqat

KV_MODES = ("paper", "serving")


@dataclass(frozen=True)
class KVCache:
    """One layer's cache: codes [S, Hkv, T, D or D/2], scales [S, T] (paper) or [S, Hkv, T]
    (serving).

    ``bits`` 8 holds int8, 4 holds packed uint8, 16 holds rotated floats and empty scales.
    """

    k_codes: Tensor
    k_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor
    bits: int
    mode: str

    @classmethod
    def allocate(
        cls,
        slots: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        bits: int,
        mode: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> KVCache:
        """Empty cache for ``slots`` sequences of up to ``max_len`` tokens; ``dtype`` only matters
        to 16 bits.
        """
        if bits not in (4, 8, 16):
            raise InvalidArgument(f"bits: a KV cache holds 4, 8 or 16 bits, got {bits}")
        if mode not in KV_MODES:
            raise InvalidArgument(f"mode: {mode!r} is unknown; use one of {', '.join(KV_MODES)}")
        if head_dim % 2:
            raise InvalidArgument(f"head_dim: {head_dim} is odd; RoPE needs an even head dimension")
        width = head_dim // 2 if bits == 4 else head_dim
        code_dtype = {4: torch.uint8, 8: torch.int8, 16: dtype}[bits]
        shape = (slots, kv_heads, max_len, width)
        scale_shape = (
            (0,)
            if bits == 16
            else (slots, max_len)
            if mode == "paper"
            else (slots, kv_heads, max_len)
        )

        def codes() -> Tensor:
            return torch.zeros(shape, dtype=code_dtype, device=device)

        def scales() -> Tensor:
            return torch.ones(scale_shape, dtype=torch.float32, device=device)

        return cls(codes(), scales(), codes(), scales(), bits, mode)

    @property
    def pre_rope(self) -> bool:
        """Whether the cache holds K before RoPE (and attention rotates it)."""
        return self.mode == "paper" and self.bits != 16

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.nbytes for t in (self.k_codes, self.k_scale, self.v_codes, self.v_scale))


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate x [n, H, D] by the tables cos, sin [T, D/2] at ``positions`` int64 [n] (spec 9)."""
    check_tensor("x", x, FLOAT_DTYPES, 3)
    check_tensor("positions", positions, (torch.int64,))
    check_shape("positions", positions, (x.shape[0],))
    return ops.rope(x, cos, sin, positions)


def rope_fake_quantize(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    bits: int,
    mode: str,
    ste_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The training form of the cache: what attention would read of k, v [n, Hkv, D] (spec 9).

    Args:
        k, v: float, k before RoPE. cos, sin: tables [T, D / 2]. positions: int64 [n].
        bits: 2..8, or 16 / 32 to rotate only. mode: ``paper`` or ``serving``.

    Returns:
        rotated, fake-quantized keys and fake-quantized values, differentiable in k and v
        (straight through).
    """
    check_tensor("k", k, FLOAT_DTYPES, 3)
    check_tensor("v", v, (k.dtype,), 3)
    check_shape("v", v, tuple(k.shape))
    check_tensor("positions", positions, (torch.int64,))
    check_shape("positions", positions, (k.shape[0],))
    check_bits("bits", bits, (16, 32))
    if mode not in KV_MODES:
        raise InvalidArgument(f"mode: {mode!r} is unknown; use one of {', '.join(KV_MODES)}")
    keys, values = ops.rope_fake_quantize(
        k, v, cos, sin, positions, bits, mode == "paper", check_clip(ste_clip)
    )
    return keys, values


def rope_quantize_append(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, slots: Tensor, positions: Tensor
) -> None:
    """Quantize n tokens' k, v [n, Hkv, D] (k before RoPE) and write them to the cache in place
    (spec 9).
    """
    check_tensor("k", k, FLOAT_DTYPES, 3)
    check_tensor("v", v, (k.dtype,), 3)
    check_shape("v", v, tuple(k.shape))
    check_shape("slots", slots, (k.shape[0],))
    check_shape("positions", positions, (k.shape[0],))
    ops.rope_quantize_append(
        k,
        v,
        cos,
        sin,
        cache.k_codes,
        cache.k_scale,
        cache.v_codes,
        cache.v_scale,
        slots,
        positions,
        cache.bits,
        cache.pre_rope,
    )


def attention_decode(
    q: Tensor,
    cache: KVCache,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """Attention of rotated queries q [n, H, D] over tokens ``0..lengths[i]-1`` of ``slots[i]`` ->
    [n, H, D] (spec 9).
    """
    check_tensor("q", q, FLOAT_DTYPES, 3)
    check_shape("slots", slots, (q.shape[0],))
    check_shape("lengths", lengths, (q.shape[0],))
    kv_heads = cache.k_codes.shape[1]
    if q.shape[1] % kv_heads:
        raise InvalidArgument(
            f"q: {q.shape[1]} heads are not a multiple of the cache's {kv_heads} KV heads"
        )
    return ops.attention_decode(
        q,
        cache.k_codes,
        cache.k_scale,
        cache.v_codes,
        cache.v_scale,
        cos,
        sin,
        slots,
        lengths,
        scaling,
        cache.bits,
        cache.pre_rope,
    )
