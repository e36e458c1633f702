"""Entries of the quantized KV cache: appending tokens, decode attention over it, the training form.

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
from benchmarks.entry import (
    Call,
    Cost,
    Entry,
    Grid,
    Job,
    Shape,
    nbytes,
    normal,
    on_reference,
    same_bits,
    within_ratio,
)
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
GPU_APPENDS = Grid(
    (Shape("LLaMA-7B", {"n": 2048, **LLAMA}), Shape("LLaMA-7B", {"n": 64, **LLAMA})),
    (torch.bfloat16,),
)
GPU_DECODES = Grid(
    (
        Shape("LLaMA-7B", {"n": 16, "T": 2048, **LLAMA}),
        Shape("LLaMA-7B", {"n": 1, "T": 32768, **LLAMA}),
        Shape("LLaMA-3-8B", {"n": 16, "T": 4096, "H": 32, "Hkv": 8, "D": 128}),
        Shape("LLaMA-7B", {"n": 1, "T": 2048, **LLAMA}),
    ),
    (torch.bfloat16,),
)
GPU_TRAINED = Grid((Shape("LLaMA-7B", {"n": 2048, **LLAMA}),), (torch.bfloat16,))
APPEND_LENGTH = 128
APPEND_SLOTS = 64
VARIANTS = ((8, "serving"), (4, "serving"), (8, "paper"), (4, "paper"))
"""Every cache that a checkpoint can ask for below 16 bits."""


def _tables(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, D / 2] of RoPE with base 10,000."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


def _tokens(
    shape: Shape, heads: str, seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    size = (shape["n"], shape[heads], shape["D"])
    return normal(*size, seed=seed, dtype=dtype, device=device)


def _scales(shape: Shape, mode: str) -> int:
    """Scales of one token of K (or V)."""
    return 1 if mode == "paper" else shape["Hkv"]


def _append(bits: int, mode: str) -> Callable[..., Job]:
    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        n = shape["n"]
        k, v = (_tokens(shape, "Hkv", seed, device, dtype) for seed in (0, 1))
        cos, sin = _tables(APPEND_LENGTH, shape["D"], device)
        count = min(n, APPEND_SLOTS)
        slots = torch.arange(n, device=device) % count
        positions = (torch.arange(n, device=device) // count + slots) * 7 % APPEND_LENGTH

        def fresh() -> KVCache:
            sizes = (count, shape["Hkv"], APPEND_LENGTH, shape["D"])
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
        inputs = 2 * values * nbytes(dtype) + shape["n"] * shape["D"] * 4
        return Cost(inputs + stored, 12 * values)

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
        q = _tokens(shape, "H", 2, device, dtype)
        slots = torch.arange(n, device=device)
        lengths = torch.full((n,), tokens, device=device)
        scaling = dim**-0.5

        def call() -> Tensor:
            return qk.attention_decode(q, cache, cos, sin, slots, lengths, scaling=scaling)

        def dense(to: torch.dtype) -> tuple[Tensor, Tensor]:
            found = []
            for codes, scale in ((cache.k_codes, cache.k_scale), (cache.v_codes, cache.v_scale)):
                wide = eager.unpack_int4(codes) if bits == 4 else codes
                heads = scale.unsqueeze(1) if mode == "paper" else scale
                found.append(eager.dequantize(wide, heads, to))
            if mode == "paper":
                found[0] = eager.rotate(found[0], cos, sin)
            return found[0], found[1]

        def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(
                query.unsqueeze(2), key, value, scale=scaling, enable_gqa=True
            )
            return y.squeeze(2)

        key, value = dense(torch.float32)
        half = [t.bfloat16() for t in (q, key, value)]

        def exact() -> Tensor:
            repeats = shape["H"] // shape["Hkv"]
            k64, v64 = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
            weights = (k64 @ q.double().unsqueeze(-1) * scaling).softmax(2)
            return (weights.transpose(2, 3) @ v64).squeeze(2)

        baselines: dict[str, Call] = {
            "SDPA, bf16 cache": lambda: sdpa(*half),
            "eager dequantize + SDPA": lambda: sdpa(q, *dense(dtype)),
        }
        if dtype == torch.float32:
            baselines = {"SDPA, fp32 cache": lambda: sdpa(q, key, value), **baselines}
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
        traffic = stored + tables + 2 * n * shape["H"] * dim * nbytes(dtype)
        return Cost(traffic, 4 * n * shape["H"] * tokens * dim + rotation)

    return cost


def _rope_fake_quantize(mode: str) -> Callable[..., Job]:
    """Forward and backward of what attention reads in training, 4 bit."""

    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Job:
        k, v = (_tokens(shape, "Hkv", seed, device, dtype).requires_grad_() for seed in (0, 1))
        grads = [_tokens(shape, "Hkv", seed, device, dtype) for seed in (2, 3)]
        cos, sin = _tables(shape["n"], shape["D"], device)
        positions = torch.arange(shape["n"], device=device)

        def step(forward: Callable[[], tuple[Tensor, Tensor]]) -> Call:
            def run() -> tuple[Tensor, ...]:
                outputs = forward()
                return *outputs, *torch.autograd.grad(outputs, (k, v), grads)

            return run

        call = step(lambda: qk.rope_fake_quantize(k, v, cos, sin, positions, bits=4, mode=mode))
        paper = mode == "paper"
        plain = step(lambda: eager.rope_fake_quantize(k, v, *_at(cos, sin, positions), 4, paper))
        return Job(call, {"eager": plain}, same_bits(call), 1e-2 if dtype == torch.float32 else 0.2)

    return build


def _rope_fake_quantize_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """k and v in and out, their gradients in, the gradient of k out (that of v is passed on)."""
    values = shape["n"] * shape["Hkv"] * shape["D"]
    return Cost(7 * values * nbytes(dtype) + 2 * shape["n"] * shape["D"] * 4, 16 * values)


ENTRIES = (
    *(
        Entry(
            "rope_quantize_append",
            f"KV{bits} {mode}",
            _append_cost(bits, mode),
            _append(bits, mode),
            Grid(APPENDS, FP32),
            GPU_APPENDS,
        )
        for bits, mode in VARIANTS
    ),
    *(
        Entry(
            "attention_decode",
            f"KV{bits} {mode}",
            _decode_cost(bits, mode),
            _decode(bits, mode),
            Grid(DECODES, FP32),
            GPU_DECODES,
        )
        for bits, mode in VARIANTS
    ),
    *(
        Entry(
            "rope_fake_quantize",
            f"4 bit {mode}, forward and backward",
            _rope_fake_quantize_cost,
            _rope_fake_quantize(mode),
            cuda=GPU_TRAINED,
        )
        for mode in ("paper", "serving")
    ),
)
