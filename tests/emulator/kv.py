"""The C structures of csrc/cuda/kv_cache.h, and caches on guarded pages."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.emulator.memory import Guarded, guard

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORAGE = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.float32: 2,
    torch.bfloat16: 3,
    torch.float16: 4,
}
PAGE = 64
AUTO, WHOLE, APART = range(3)
"""How blocks are made of warps: chosen, a split a block, a part of it a block."""
_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class KvCache(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("k", "v", "k_scale", "v_scale", "page_table")),
        *(
            (name, _long)
            for name in ("slots", "pages", "blocks", "heads", "block_tokens", "head_dim")
        ),
        ("storage", _int),
        ("bits", _int),
        ("pre_rope", ctypes.c_bool),
    ]


class RopeTables(ctypes.Structure):
    _fields_ = [("cos", _pointer), ("sin", _pointer), ("rows", _long)]


class Heads(ctypes.Structure):
    _fields_ = [("data", _pointer), ("token", _long), ("head", _long)]


class Append(ctypes.Structure):
    _fields_ = [
        *((name, Heads) for name in ("k", "v", "q")),
        *((name, _pointer) for name in ("q_out", "slots", "positions")),
        *((name, _long) for name in ("n", "q_heads")),
        ("dtype", _int),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("q", Heads),
        *((name, _pointer) for name in ("slots", "lengths", "out")),
        *((name, _pointer) for name in ("codes", "codes_scale", "workspace", "tickets")),
        *((name, _long) for name in ("n", "heads", "max_length", "sms")),
        ("scaling", _float),
        *((name, _int) for name in ("dtype", "quantize_bits", "plan")),
    ]


@dataclass
class Cache:
    """A cache (k_codes, k_scale, v_codes, v_scale) and the structure that points to it."""

    tensors: list[Guarded]
    table: Guarded | None
    struct: KvCache

    def check(self) -> list[Tensor]:
        return [each.check() for each in self.tensors]


def cache_of(tensors, head_dim: int, bits: int, pre_rope: bool, table: Tensor | None = None):
    """Copies [S, Hkv, T, ...] (or pages [P, Hkv, 64, ...] with their table) to guarded pages."""
    guarded = [guard(t) for t in tensors]
    own_table = None if table is None else guard(table)
    k_codes, k_scale, v_codes, v_scale = guarded
    blocks, heads, tokens = k_codes.tensor.shape[:3]
    struct = KvCache(
        k=k_codes.pointer,
        v=v_codes.pointer,
        k_scale=k_scale.pointer,
        v_scale=v_scale.pointer,
        page_table=None if own_table is None else own_table.pointer,
        slots=blocks if table is None else table.shape[0],
        pages=0 if table is None else table.shape[1],
        blocks=blocks,
        heads=heads,
        block_tokens=tokens,
        head_dim=head_dim,
        storage=STORAGE[k_codes.tensor.dtype],
        bits=bits,
        pre_rope=pre_rope,
    )
    return Cache(guarded, own_table, struct)


def heads_of(x: Tensor):
    """(the structure of x [n, heads, D], what keeps its memory alive): the values between the
    first and the last of it, as they lie, on guarded pages.
    """
    span = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    kept = guard(x.as_strided((span if x.numel() else 0,), (1,)))
    return Heads(kept.pointer, x.stride(0), x.stride(1)), kept


def views(n: int, heads: tuple[int, ...], head_dim: int, dtype: torch.dtype, seed: int = 0):
    """Tensors [n, heads[i], D] as the engine has them: parts of one product, NaN between them."""
    random = torch.Generator().manual_seed(seed)
    total = sum(heads) + len(heads)
    base = torch.full((n, total, head_dim), float("nan"), dtype=dtype)
    first = 0
    for count in heads:
        part = base[:, first : first + count]
        yield part.copy_(torch.randn(part.shape, generator=random).to(dtype))
        first += count + 1


def tables_of(cos: Tensor, sin: Tensor):
    """(the structure, what keeps its memory alive)."""
    kept = (guard(cos), guard(sin))
    return RopeTables(kept[0].pointer, kept[1].pointer, cos.shape[0]), kept


def paged(tensors, seed: int, spare: int = 2):
    """A contiguous cache as pages in random order with unused ones between: (tensors, table).

    Entries of the last column are -1 where nothing of a slot lies there.
    """
    slots, heads, tokens = tensors[0].shape[:3]
    pages = -(-tokens // PAGE)
    order = torch.randperm(slots * pages + spare, generator=torch.Generator().manual_seed(seed)).to(
        torch.int32
    )
    table = order[: slots * pages].view(slots, pages).contiguous()
    out = []
    for t in tensors:
        if t.numel() == 0:
            out.append(t)
            continue
        per_head = t.shape[:3] == (slots, heads, tokens)
        shape = (len(order), heads, PAGE) if per_head else (len(order), PAGE)
        pool = torch.empty(*shape, *t.shape[len(shape) :], dtype=t.dtype)
        pool.view(torch.uint8).fill_(0xFF)
        for s in range(slots):
            for j in range(pages):
                piece = t[s, ..., j * PAGE : (j + 1) * PAGE, :] if t.dim() == 4 else None
                if piece is None:
                    piece = t[s, ..., j * PAGE : (j + 1) * PAGE]
                page = pool[int(table[s, j])]
                if t.dim() == 4:
                    page[..., : piece.shape[-2], :] = piece
                else:
                    page[..., : piece.shape[-1]] = piece
        out.append(pool)
    return out, table


def gathered(tensors, table: Tensor, tokens: int):
    """The contiguous cache that pages hold: the inverse of :func:`paged`."""
    out = []
    for t in tensors:
        if t.numel() == 0:
            out.append(t)
            continue
        picked = t[table.long()]  # [S, pages, (Hkv,) 64, ...]
        head = 1 if t.dim() >= 3 else 0
        if head:
            picked = picked.movedim(1, 2).flatten(2, 3)[:, :, :tokens]
        else:
            picked = picked.flatten(1, 2)[:, :tokens]
        out.append(picked)
    return out
