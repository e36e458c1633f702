"""Entries of the quantized KV cache: appending tokens, and decode attention over it.

Floors: the codes and scales of the tokens read or written once, k, v (or q and the result) once.
Attention has 4HTD fp32 operations (scores and weighted sum), an append 4 for RoPE and 4 for the
codes of a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import eager
from benchmarks.entry import Call, Cost, Entry, Job, Shape, normal, on_reference, within_ratio
from llmqat_kernels.kv import KVCache
from llmqat_kernels.testing import assert_same_bits

FP32 = (torch.float32,)
SMOL, LLAMA = {"H": 9, "Hkv": 3, "D": 64}, {"H": 32, "Hkv": 32, "D": 128}
APPENDS = (
    Shape("SmolLM2", {"n": 1, **SMOL}),
    Shape("SmolLM2", {"n": 64, **SMOL}),
    Shape("LLaMA-7B", {"n": 8, **LLAMA}),
)
DECODES = (
    Shape("SmolLM2", {"n": 1, "T": 512, **SMOL}),
    Shape("SmolLM2", {"n": 16, "T": 256, **SMOL}),
    Shape("LLaMA-7B", {"n": 1, "T": 2048, **LLAMA}),
)
APPEND_LENGTH = 128
VARIANTS = ((8, "serving"), (4, "serving"), (8, "paper"))


def _tables(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, D / 2] of RoPE with base 10,000."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


def _tokens(shape: Shape, heads: str, seed: int, device: torch.device) -> Tensor:
    size = (shape["n"], shape[heads], shape["D"])
    return normal(*size, seed=seed, dtype=torch.float32, device=device)


def _scales(shape: Shape, mode: str) -> int:
    """Scales of one token of K (or V)."""
    return 1 if mode == "paper" else shape["Hkv"]


def _append(bits: int, mode: str) -> Callable[..., Job]:
    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        n = shape["n"]
        k, v = _tokens(shape, "Hkv", 0, device), _tokens(shape, "Hkv", 1, device)
        cos, sin = _tables(APPEND_LENGTH, shape["D"], device)
        slots = torch.arange(n, device=device)
        positions = (slots * 7) % APPEND_LENGTH

        def fresh() -> KVCache:
            sizes = (n, shape["Hkv"], APPEND_LENGTH, shape["D"])
            return KVCache.allocate(*sizes, bits=bits, mode=mode, device=device)

        ours, theirs = fresh(), fresh()

        def append(cache: KVCache) -> tuple[Tensor, ...]:
            qk.rope_quantize_append(k, v, cos, sin, cache, slots, positions)
            return cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale

        def plain() -> Tensor:
            keys = k if mode == "paper" else eager.rotate(k, *_at(cos, sin, positions))
            for x, codes, scale in (
                (keys, theirs.k_codes, theirs.k_scale),
                (v, theirs.v_codes, theirs.v_scale),
            ):
                q, s = eager.quantize(x.flatten(1) if mode == "paper" else x, bits)
                q = q.view(x.shape)
                codes[slots, :, positions] = eager.pack_int4(q) if bits == 4 else q
                if mode == "paper":
                    scale[slots, positions] = s
                else:
                    scale[slots, :, positions] = s
            return theirs.k_codes

        def gate() -> None:
            expected = on_reference(lambda: append(fresh()))
            for actual, reference in zip(append(ours), expected, strict=True):
                assert_same_bits(actual, reference)

        return Job(lambda: append(ours), {"eager": plain}, gate, 2e-2)

    return build


def _at(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def _append_cost(bits: int, mode: str) -> Callable[[Shape, torch.dtype], Cost]:
    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        values = shape["n"] * shape["Hkv"] * shape["D"]
        stored = 2 * (values * bits // 8 + 4 * shape["n"] * _scales(shape, mode))
        # k and v in, cos and sin of the tokens, codes and scales out.
        return Cost(2 * values * 4 + shape["n"] * shape["D"] * 4 + stored, 12 * values)

    return cost


def _decode(bits: int, mode: str) -> Callable[..., Job]:
    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        n, tokens, dim = shape["n"], shape["T"], shape["D"]
        cache = KVCache.allocate(n, shape["Hkv"], tokens, dim, bits=bits, mode=mode, device=device)
        cos, sin = _tables(tokens, dim, device)
        size = (n * tokens, shape["Hkv"], dim)
        qk.rope_quantize_append(
            normal(*size, seed=0, dtype=torch.float32, device=device),
            normal(*size, seed=1, dtype=torch.float32, device=device),
            cos,
            sin,
            cache,
            torch.arange(n, device=device).repeat_interleave(tokens),
            torch.arange(tokens, device=device).repeat(n),
        )
        q = _tokens(shape, "H", 2, device)
        slots = torch.arange(n, device=device)
        lengths = torch.full((n,), tokens, device=device)
        scaling = dim**-0.5

        def call() -> Tensor:
            return qk.attention_decode(q, cache, cos, sin, slots, lengths, scaling=scaling)

        def dense() -> tuple[Tensor, Tensor]:
            found = []
            for codes, scale in ((cache.k_codes, cache.k_scale), (cache.v_codes, cache.v_scale)):
                wide = eager.unpack_int4(codes) if bits == 4 else codes
                heads = scale.unsqueeze(1) if mode == "paper" else scale
                found.append(eager.dequantize(wide, heads, torch.float32))
            if mode == "paper":
                found[0] = eager.rotate(found[0], cos, sin)
            return found[0], found[1]

        def sdpa(key: Tensor, value: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(
                q.unsqueeze(2), key, value, scale=scaling, enable_gqa=True
            )
            return y.squeeze(2)

        key, value = dense()
        half_key, half_value, half_q = (t.bfloat16() for t in (key, value, q))

        def sdpa_bf16() -> Tensor:
            return F.scaled_dot_product_attention(
                half_q.unsqueeze(2), half_key, half_value, scale=scaling, enable_gqa=True
            ).squeeze(2)

        def exact() -> Tensor:
            repeats = shape["H"] // shape["Hkv"]
            k64, v64 = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
            weights = (k64 @ q.double().unsqueeze(-1) * scaling).softmax(2)
            return (weights.transpose(2, 3) @ v64).squeeze(2)

        baselines: dict[str, Call] = {
            "SDPA, fp32 cache": lambda: sdpa(key, value),
            "SDPA, bf16 cache": sdpa_bf16,
            "eager dequantize + SDPA": lambda: sdpa(*dense()),
        }
        return Job(call, baselines, within_ratio(call, exact), 2e-2)

    return build


def _decode_cost(bits: int, mode: str) -> Callable[[Shape, torch.dtype], Cost]:
    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        n, tokens, dim = shape["n"], shape["T"], shape["D"]
        stored = 2 * n * tokens * (shape["Hkv"] * dim * bits // 8 + 4 * _scales(shape, mode))
        # The paper's mode also reads RoPE's tables and rotates K (3 operations a value).
        paper = mode == "paper"
        tables = tokens * dim * 4 if paper else 0
        rotation = 3 * n * shape["Hkv"] * tokens * dim if paper else 0
        traffic = stored + tables + 2 * n * shape["H"] * dim * 4
        return Cost(traffic, 4 * n * shape["H"] * tokens * dim + rotation)

    return cost


ENTRIES = (
    *(
        Entry(
            "rope_quantize_append",
            f"KV{bits} {mode}",
            APPENDS,
            FP32,
            _append_cost(bits, mode),
            _append(bits, mode),
        )
        for bits, mode in VARIANTS
    ),
    *(
        Entry(
            "attention_decode",
            f"KV{bits} {mode}",
            DECODES,
            FP32,
            _decode_cost(bits, mode),
            _decode(bits, mode),
        )
        for bits, mode in VARIANTS
    ),
)
