"""Validation at the public edge: a clear typed error before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InvalidArgument, InvalidArgumentType

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 131_071
"""Longest reduction whose int32 accumulator cannot overflow: 131071 * 127^2 < 2^31 (spec 7)."""

MAX_INTEGER_GROUP_K = 38_342
"""Longest reduction with integer group multipliers: 63 * 7 * 127 * 38342 < 2^31 (spec 18)."""


def check_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], min_dim: int = 1
) -> None:
    """``value`` must be a tensor of one of ``dtypes`` with at least ``min_dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise InvalidArgumentType(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InvalidArgumentType(f"{name}: dtype {value.dtype} is not supported; use {wanted}")
    if value.dim() < min_dim:
        raise InvalidArgument(
            f"{name}: needs at least {min_dim} dimension(s), got shape {tuple(value.shape)}"
        )
    if value.layout != torch.strided:
        raise InvalidArgument(
            f"{name}: layout {value.layout} is not supported; pass a dense tensor"
        )


def check_output_dtype(dtype: object) -> None:
    """``dtype`` must be one that results can have."""
    if dtype not in FLOAT_DTYPES:
        raise InvalidArgument(f"dtype: {dtype} is not supported; use float32, float16 or bfloat16")


def check_bits(name: str, bits: object, extra: tuple[int, ...] = ()) -> int:
    """``bits`` must be an int of 2..8 (or one of ``extra``)."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise InvalidArgumentType(f"{name}: expected an int, got {type(bits).__name__}")
    if not 2 <= bits <= 8 and bits not in extra:
        more = "".join(f" or {e}" for e in extra)
        raise InvalidArgument(f"{name}: {bits} is out of range; use 2..8{more}")
    return bits


def check_group_size(columns: int, group_size: object) -> int:
    """``group_size`` must be -1 (whole rows) or divide the row length."""
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise InvalidArgumentType(f"group_size: expected an int, got {type(group_size).__name__}")
    if group_size != -1 and (group_size < 1 or columns % group_size):
        raise InvalidArgument(
            f"group_size: {group_size} does not divide {columns} columns; use -1 or a divisor"
        )
    return group_size


def check_integer_scales(k: int, bits: int, group_size: int, name: str = "w_bits") -> None:
    """Integer scales need groups, and what they multiply must be summed exactly (spec 18)."""
    if bits > 4:
        raise InvalidArgument(
            f"{name}: integer groups hold 2..4 bits (their int32 sums would overflow), got {bits}"
        )
    if group_size == -1:
        raise InvalidArgument("group_size: -1 has no groups; use a divisor of the row length")
    if k > MAX_INTEGER_GROUP_K:
        raise InvalidArgument(
            f"x: {k} features exceed {MAX_INTEGER_GROUP_K}, the longest exact sum of integer groups"
            " of 4-bit weights; use float group scales"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """All given tensors must live on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(devices.items()))
    for name, device in devices.items():
        if device != first:
            raise InvalidArgument(
                f"{name}: is on {device} but {first_name} is on {first}; move one of them"
            )


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """``value`` must have exactly ``shape``."""
    if tuple(value.shape) != shape:
        raise InvalidArgument(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def scale_shape(rows: tuple[int, ...], columns: int, group_size: int) -> tuple[int, ...]:
    """Shape of the scales of rows of ``columns`` elements."""
    return rows if group_size == -1 else (*rows, columns // group_size)


def check_weight(w: Tensor, w_scale: Tensor, k: int, w_bits: int, group_size: int) -> None:
    """``w`` int8 codes [N, K] or packed uint8 [N, ceil(K / 2)] with fp32 scales [N] or [N,
    groups].
    """
    check_tensor("w", w, (torch.int8, torch.uint8), 2)
    check_tensor("w_scale", w_scale, (torch.float32,), 1)
    if w.dim() != 2:
        raise InvalidArgument(f"w: expected 2 dimensions [N, K], got shape {tuple(w.shape)}")
    if w.dtype == torch.uint8 and w_bits != 4:
        raise InvalidArgument(
            f"w: packed uint8 holds 4-bit codes but w_bits is {w_bits}; pass int8 codes"
        )
    columns = (k + 1) // 2 if w.dtype == torch.uint8 else k
    if w.shape[1] != columns:
        raise InvalidArgument(
            f"w: expected {columns} columns for x with {k} features, got {w.shape[1]}"
        )
    if k > MAX_K:
        raise InvalidArgument(
            f"x: {k} features exceed {MAX_K}, the longest exact int32 accumulation; split the layer"
        )
    check_group_size(k, group_size)
    check_shape("w_scale", w_scale, scale_shape((w.shape[0],), k, group_size))
