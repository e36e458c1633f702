"""What a KV cache's tensors hold, checked for the operators that write and read it (spec 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import FLOAT_DTYPES, check_shape, check_tensor
from ...errors import InvalidArgument
from ...spec.quantize import QUANTIZED_BITS
from .launch import ALIGNMENT, aligned, rows_near


@dataclass(frozen=True)
class CacheForm:
    """Sizes of one cache [slots, heads, tokens, row] and how its rows are stored.

    Attributes:
        slots, heads, tokens: its first three sizes; heads are KV heads.
        half: half of the head dimension, what RoPE pairs.
        quantized: codes with scales, not floats.
        packed: two codes a byte.
        per_token: one scale per token over all heads, and K before RoPE (the paper's mode).
    """

    slots: int
    heads: int
    tokens: int
    half: int
    quantized: bool
    packed: bool
    per_token: bool


def cache_form(
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    head_dim: int,
    bits: int,
    pre_rope: bool,
) -> CacheForm:
    """The form of a cache whose four tensors agree with each other.

    Raises:
        InvalidArgumentType: codes or scales of a dtype that ``bits`` cannot have.
        InvalidArgument: sizes that disagree, an odd head dimension, or a cache that is not
            contiguous (kernels write it in place, so it cannot be copied).
    """
    quantized = bits in QUANTIZED_BITS
    if head_dim < 2 or head_dim % 2:
        raise InvalidArgument(f"head_dim: {head_dim} is not positive and even, as RoPE needs")
    allowed = FLOAT_DTYPES
    if quantized:
        allowed = (torch.int8, torch.uint8) if bits <= 4 else (torch.int8,)
    check_tensor("k_codes", k_codes, allowed, 4)
    check_tensor("v_codes", v_codes, (k_codes.dtype,), 4)
    packed = k_codes.dtype == torch.uint8
    slots, heads, tokens, _ = k_codes.shape
    shape = (slots, heads, tokens, head_dim // 2 if packed else head_dim)
    scale_shape = (slots, tokens) if pre_rope else (slots, heads, tokens)
    for name, codes, scale in (("k", k_codes, k_scale), ("v", v_codes, v_scale)):
        check_shape(f"{name}_codes", codes, shape)
        _check_contiguous(f"{name}_codes", codes)
        if quantized:
            check_tensor(f"{name}_scale", scale, (torch.float32,))
            check_shape(f"{name}_scale", scale, scale_shape)
            _check_contiguous(f"{name}_scale", scale)
    half = head_dim // 2
    return CacheForm(slots, heads, tokens, half, quantized, packed, quantized and pre_rope)


def check_table(cos: Tensor, sin: Tensor, half: int) -> None:
    """cos and sin must be one table [T, half] each.

    Raises:
        InvalidArgument: other sizes.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, (cos.shape[0], half))


def check_index(name: str, index: Tensor, n: int) -> None:
    """``index`` must be int64 [n].

    Raises:
        InvalidArgumentType: another dtype. InvalidArgument: another size.
    """
    check_tensor(name, index, (torch.int64,))
    check_shape(name, index, (n,))


def heads_of(x: Tensor) -> tuple[Tensor, bool]:
    """x [n, H, D], and whether its heads begin at multiples of 16 bytes. A view of a wider
    projection stays a view, unless only a copy begins there.
    """
    if x.shape[-1] % ALIGNMENT:
        return rows_near(x), False
    places = (*x.stride()[:-1], x.data_ptr())
    return rows_near(x) if all(p % ALIGNMENT == 0 for p in places) else aligned(x), True


def _check_contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise InvalidArgument(f"{name}: expected a contiguous cache; allocate it contiguous")
