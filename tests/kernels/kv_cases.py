"""Caches, tables and poison shared by the tests of rope_quantize_append and attention_decode."""

import torch

from llmqat_kernels.testing import generator

CODE_DTYPE = {4: torch.uint8, 8: torch.int8, 16: torch.float32}
MODES = ("paper", "serving")


def tables(tokens: int, head_dim: int):
    """cos, sin fp32 [tokens, head_dim / 2] as LLaMA makes them."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(tokens)[:, None] * inverse
    return angles.cos(), angles.sin()


def poison(tensor, kind: str, seed: int = 0):
    """Fill in place with what a never-written cache may hold."""
    if kind == "zero":
        return tensor.zero_()
    if kind == "random":
        raw = tensor.view(torch.uint8)
        return raw.copy_(
            torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator(seed))
        ).view(tensor.dtype)
    return tensor.fill_(
        float("nan") if tensor.is_floating_point() else 0x80 - 256 * (tensor.dtype == torch.int8)
    )


def empty_cache(slots, heads, tokens, head_dim, bits, mode, kind="nan", float_dtype=torch.float32):
    """(k_codes, k_scale, v_codes, v_scale), poisoned."""
    width = head_dim // 2 if bits == 4 else head_dim
    code_dtype = float_dtype if bits == 16 else CODE_DTYPE[bits]
    scale_shape = (
        (0,) if bits == 16 else (slots, tokens) if mode == "paper" else (slots, heads, tokens)
    )
    made = []
    for i in range(2):
        made.append(poison(torch.empty(slots, heads, tokens, width, dtype=code_dtype), kind, i))
        made.append(poison(torch.empty(scale_shape), kind, i + 2))
    return tuple(made)


def fill(op, cache, lengths, heads, head_dim, bits, mode, dtype, seed=0):
    """Append random tokens 0..lengths[s]-1 to every slot s with ``op`` (an append function)."""
    tokens = cache[0].shape[2]
    cos, sin = tables(tokens, head_dim)
    slots = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
    positions = torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int64)
    k, v = torch.randn(2, len(slots), heads, head_dim, generator=generator(seed)).to(dtype)
    op(k, v, cos, sin, *cache, slots, positions, bits, mode == "paper")
    return k, v
