"""RoPE, the write into the KV cache, and the training form of both.

Math:     spec 9, 19. A row is one head of one token (serving) or all heads of it (paper).
Shapes:   k, v [n, Hkv, D], tables [T, D / 2], caches [S, Hkv, T, D or D / 2].
Dtypes:   fp32, fp16, bf16 in; int8, packed uint8 or float caches; fp32 scales and arithmetic.
Tiling:   one token a program, K and V in different programs (a decode step has few tokens). The
          halves of the heads are two tiles, so RoPE pairs stay in a lane, and the tables are
          loaded once for all heads of a program. Paper: all heads of a token; serving and
          rope: 1024 elements, two 16-byte loads of bf16 a lane.
Cost:     bf16 to int8: 3 bytes an element and the table row; one read, one write.
Numerics: exact: every product and sum rounded to the dtype of x.
Edges:    even D, odd heads and odd halves are masked. A position outside the table rotates to
          NaN; a place outside the cache is not written (indices are never read by the host).
Limits:   paper: Hkv * D <= 16,384 after rounding both to powers of two.
Tests:    tests/triton/test_rope_quantize_append.py, tests/kernels/test_rope_fake_quantize.py
Bench:    python -m benchmarks.run --op rope_quantize_append --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InvalidArgument
from ...spec.quantize import QUANTIZED_BITS, qmax
from . import rope_tiles
from .kv_cache import cache_form, check_index, check_table, heads_of
from .launch import ALIGNMENT, TRITON_TYPES, Variant, aligned, empty, launch, unaligned
from .rope_tiles import head_tile
from .row_tiles import next_power_of_two


@triton.jit(do_not_specialize=["positions", "heads", "table_rows"])
def rope_kernel(
    x, cos, sin, positions, y, heads, table_rows, token_stride, head_stride,
    HALF: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF_BLOCK)
    mask = (head < heads)[:, None] & (d < HALF)[None, :]
    x1, x2 = rope_tiles.load_halves(x, token, (token_stride, head_stride), head, d, mask, HALF)
    position = tl.load(positions + token)
    x1, x2 = rope_tiles.rotated(x1, x2, cos, sin, position, table_rows, d, HALF, x.dtype.element_ty)
    at = (token * heads + head)[:, None] * (2 * HALF) + d[None, :]
    rope_tiles.store_halves(y, at, x1, x2, mask, HALF)


@triton.jit
def _fake_quantize(
    x, y, cos, sin, positions, heads, table_rows, stride, ROTATE: tl.constexpr,
    QMAX: tl.constexpr, PER_TOKEN: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF_BLOCK)
    mask = (head < heads)[:, None] & (d < HALF)[None, :]
    x1, x2 = rope_tiles.load_halves(x, token, stride, head, d, mask, HALF)
    position = tl.load(positions + token)
    if ROTATE and not PER_TOKEN:
        x1, x2 = rope_tiles.rotated(x1, x2, cos, sin, position, table_rows, d, HALF, dtype)
    if QMAX > 0:
        code1, code2, scale = rope_tiles.quantized(x1, x2, mask, QMAX, PER_TOKEN)
        x1 = rope_tiles.round(code1.to(tl.float32) * scale[:, None], dtype)
        x2 = rope_tiles.round(code2.to(tl.float32) * scale[:, None], dtype)
    if ROTATE and PER_TOKEN:
        x1, x2 = rope_tiles.rotated(x1, x2, cos, sin, position, table_rows, d, HALF, dtype)
    at = (token * heads + head)[:, None] * (2 * HALF) + d[None, :]
    rope_tiles.store_halves(y, at, x1, x2, mask, HALF)


@triton.jit(do_not_specialize=["positions", "heads", "table_rows"])
def rope_fake_quantize_kernel(
    k, v, cos, sin, positions, keys, values, heads, table_rows,
    k_token, k_head, v_token, v_head, QMAX: tl.constexpr, PER_TOKEN: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _fake_quantize(
            k, keys, cos, sin, positions, heads, table_rows, (k_token, k_head), True,
            QMAX, PER_TOKEN, HALF, HEADS, HALF_BLOCK,
        )  # fmt: skip
    else:
        _fake_quantize(
            v, values, cos, sin, positions, heads, table_rows, (v_token, v_head), False,
            QMAX, PER_TOKEN, HALF, HEADS, HALF_BLOCK,
        )  # fmt: skip


@triton.jit
def _append(
    x, cos, sin, codes, scale, slots, positions, cache, table_rows, stride, ROTATE: tl.constexpr,
    QMAX: tl.constexpr, PER_TOKEN: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF_BLOCK)
    n_slots, heads, tokens = cache
    head_mask = head < heads
    mask = head_mask[:, None] & (d < HALF)[None, :]
    x1, x2 = rope_tiles.load_halves(x, token, stride, head, d, mask, HALF)
    slot = tl.load(slots + token)
    position = tl.load(positions + token)
    inside = (slot >= 0) & (slot < n_slots) & (position >= 0) & (position < tokens)
    head_mask &= inside
    if ROTATE:
        x1, x2 = rope_tiles.rotated(
            x1, x2, cos, sin, position, table_rows, d, HALF, x.dtype.element_ty
        )  # fmt: skip
    row = (slot * heads + head) * tokens + position
    if QMAX == 0:
        rope_tiles.store_halves(
            codes, row[:, None] * (2 * HALF) + d[None, :], x1, x2, mask & inside, HALF
        )
    else:
        code1, code2, s = rope_tiles.quantized(x1, x2, mask, QMAX, PER_TOKEN)
        if PACKED:
            rope_tiles.store_packed(
                codes, row * HALF, code1, code2, head_mask, HALF, HEADS, HALF_BLOCK
            )
        else:
            at = row[:, None] * (2 * HALF) + d[None, :]
            rope_tiles.store_halves(codes, at, code1, code2, mask & inside, HALF)
        if PER_TOKEN:
            tl.store(scale + slot * tokens + position + head * 0, s, mask=inside & (head == 0))
        else:
            tl.store(scale + row, s, mask=head_mask)


@triton.jit(
    do_not_specialize=[
        "k_scale", "v_scale", "slots", "positions", "n_slots", "heads", "tokens", "table_rows"
    ]
)  # fmt: skip
def rope_quantize_append_kernel(
    k, v, cos, sin, k_codes, k_scale, v_codes, v_scale, slots, positions,
    n_slots, heads, tokens, table_rows, k_token, k_head, v_token, v_head,
    QMAX: tl.constexpr, PER_TOKEN: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    cache = (n_slots, heads, tokens)
    if tl.program_id(1) == 0:
        _append(
            k, cos, sin, k_codes, k_scale, slots, positions, cache, table_rows, (k_token, k_head),
            not PER_TOKEN, QMAX, PER_TOKEN, PACKED, HALF, HEADS, HALF_BLOCK,
        )  # fmt: skip
    else:
        _append(
            v, cos, sin, v_codes, v_scale, slots, positions, cache, table_rows, (v_token, v_head),
            False, QMAX, PER_TOKEN, PACKED, HALF, HEADS, HALF_BLOCK,
        )  # fmt: skip


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """See spec 9."""
    n, heads, head_dim = x.shape
    y = empty((n, heads, head_dim), x.dtype, x.device)
    if y.numel() == 0:
        return y
    half = _checked_half(head_dim)
    check_table(cos, sin, half)
    check_index("positions", positions, n)
    x, regular = heads_of(x)
    tile = head_tile(heads, half, whole=False)
    launch(
        rope_kernel, (n, triton.cdiv(heads, tile.heads)),
        x, aligned(cos), aligned(sin), positions.contiguous(), y,
        heads, cos.shape[0], x.stride(0), x.stride(1),
        HALF=half, HEADS=tile.heads, HALF_BLOCK=tile.half_block,
        num_warps=tile.num_warps, regular=regular,
    )  # fmt: skip
    return y


def rope_fake_quantize(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
    ste_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See spec 19. ``ste_clip`` only matters to the gradient."""
    n, heads, head_dim = k.shape
    keys = empty((n, heads, head_dim), k.dtype, k.device)
    values = empty((n, heads, head_dim), v.dtype, v.device)
    if keys.numel() == 0:
        return keys, values
    half = _checked_half(head_dim)
    check_table(cos, sin, half)
    check_index("positions", positions, n)
    (k, regular), (v, _) = heads_of(k), heads_of(v)
    quantized = bits in QUANTIZED_BITS
    per_token = quantized and pre_rope
    tile = head_tile(heads, half, whole=per_token)
    launch(
        rope_fake_quantize_kernel, (n, 2, triton.cdiv(heads, tile.heads)),
        k, v, aligned(cos), aligned(sin), positions.contiguous(), keys, values,
        heads, cos.shape[0], k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        QMAX=qmax(bits) if quantized else 0, PER_TOKEN=per_token,
        HALF=half, HEADS=tile.heads, HALF_BLOCK=tile.half_block,
        num_warps=tile.num_warps, regular=regular,
    )  # fmt: skip
    return keys, values


def rope_quantize_append(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    slots: Tensor,
    positions: Tensor,
    bits: int,
    pre_rope: bool,
) -> None:
    """See spec 9. The caches are contiguous and written in place."""
    n, heads, head_dim = k.shape
    form = cache_form(k_codes, k_scale, v_codes, v_scale, head_dim, bits, pre_rope)
    if heads != form.heads or v.shape != k.shape:
        raise InvalidArgument(
            f"k, v: expected {form.heads} heads of {head_dim} columns in both, got"
            f" {tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_table(cos, sin, form.half)
    check_index("slots", slots, n)
    check_index("positions", positions, n)
    if k.numel() == 0:
        return
    (k, regular), (v, _) = heads_of(k), heads_of(v)
    tile = head_tile(heads, form.half, whole=form.per_token)
    launch(
        rope_quantize_append_kernel, (n, 2, triton.cdiv(heads, tile.heads)),
        k, v, aligned(cos), aligned(sin), k_codes, k_scale, v_codes, v_scale,
        slots.contiguous(), positions.contiguous(),
        form.slots, heads, form.tokens, cos.shape[0],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        QMAX=qmax(bits) if form.quantized else 0, PER_TOKEN=form.per_token, PACKED=form.packed,
        HALF=form.half, HEADS=tile.heads, HALF_BLOCK=tile.half_block,
        num_warps=tile.num_warps, regular=regular,
    )  # fmt: skip


def _checked_half(head_dim: int) -> int:
    if head_dim % 2:
        raise InvalidArgument(f"x: head dimension {head_dim} is odd; RoPE needs an even one")
    return head_dim // 2


KERNELS: dict[str, Any] = {
    "rope": rope,
    "rope_fake_quantize": rope_fake_quantize,
    "rope_quantize_append": rope_quantize_append,
}

SHAPES = (
    (3, 64), (8, 128), (128, 128), (40, 96), (128, 96), (128, 72), (128, 66), (32, 72), (32, 66),
)  # fmt: skip
"""(KV heads, head dimension): real models, one for each kind of half (a power of two, even, odd)
and of rows (at multiples of 16 bytes or anywhere), and the most elements that share a scale."""


def _kinds(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], bool]]:
    """(name, kernel, signature, constants, whether heads share a scale) of every kernel."""
    tables = dict.fromkeys(("cos", "sin"), "*fp32")
    strides = dict.fromkeys(("k_token", "k_head", "v_token", "v_head"), "i32")
    sizes = {"heads": "i32", "table_rows": "i32"}
    inputs = {"k": f"*{dtype}", "v": f"*{dtype}", **tables, "positions": "*i64", **sizes}
    one = {"x": f"*{dtype}", **tables, "positions": "*i64", "y": f"*{dtype}", **sizes}
    yield "rope", rope_kernel, {**one, "token_stride": "i32", "head_stride": "i32"}, {}, False
    for mode in ("off", "paper", "serving"):
        whole = mode == "paper"
        constants = {"QMAX": 0 if mode == "off" else 127, "PER_TOKEN": whole}
        outputs = {"keys": f"*{dtype}", "values": f"*{dtype}"}
        signature = {**inputs, **outputs, **strides}
        name = f"rope_fake_quantize {mode}"
        yield name, rope_fake_quantize_kernel, signature, constants, whole
        for packed in (False, True) if mode != "off" else (False,):
            store = "*u8" if packed else f"*{dtype}" if mode == "off" else "*i8"
            cache = {
                "k_codes": store, "k_scale": "*fp32", "v_codes": store, "v_scale": "*fp32",
                "slots": "*i64", "n_slots": "i32", "tokens": "i32",
            }  # fmt: skip
            flags = {**constants, "PACKED": packed} | ({"QMAX": 7} if packed else {})
            name = f"rope_quantize_append {mode}{' packed' if packed else ''}"
            yield name, rope_quantize_append_kernel, {**inputs, **cache, **strides}, flags, whole


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel and dtype at every shape of `SHAPES` that it takes."""
    for heads, head_dim in SHAPES:
        half = head_dim // 2
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            # The smallest tiles have fewer than 16 bytes a lane.
            wide = next_power_of_two(heads) * half * dtype.itemsize >= 16 * 32
            for name, kernel, signature, constants, whole in _kinds(TRITON_TYPES[dtype]):
                # More heads make another tile only if they share a scale, and whether a half is
                # even matters where two codes share a byte.
                if (heads > 40 and not whole) or (head_dim == 72 and "packed" not in name):
                    continue
                tile = head_tile(heads, half, whole)
                shape = {"HALF": half, "HEADS": tile.heads, "HALF_BLOCK": tile.half_block}
                variant = Variant(
                    f"{name} {TRITON_TYPES[dtype]} Hkv={heads} D={head_dim}",
                    kernel, signature, constants | shape, num_warps=tile.num_warps,
                    promises=frozenset({"vector_loads"} if wide else ()),
                )  # fmt: skip
                if head_dim % ALIGNMENT == 0:
                    yield variant
                # A cache may begin anywhere.
                if head_dim % ALIGNMENT or (head_dim == 128 and "append" in name):
                    yield unaligned(variant)
