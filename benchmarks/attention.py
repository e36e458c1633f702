"""Decode attention over a quantized KV cache: ours against torch's on an unquantized one.

    python -m benchmarks.attention --device cuda [--quick] [--save] [--budget 90]

Contexts of 1k to 128k tokens, batches of 1 to 64 (what fits the memory), 32 query heads of 128 over
32 KV heads (MHA) and over 8 (GQA); KV8 and KV4, modes `paper` (K before RoPE, rotated in registers)
and `serving`, on the backends `cuda` and `triton`. Baselines on the same keys and values in bf16,
already rotated: `scaled_dot_product_attention` with each of its kernels, and FlexAttention compiled
for decoding (contexts of 8k and 32k: it compiles for every shape). Before its time counts, a form
is compared with fp64 by the 2x rule on the first and last sequence and KV head; a baseline within
2 %. On a CPU: tiny sizes, the backends `cpu` and `reference`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmqat_kernels as qk
from benchmarks import cells, cuda, eager
from benchmarks.cells import BASELINE, Candidate, Pool, with_backend, without_gradient
from benchmarks.entry import Call, Cost, check_agreement, normal
from benchmarks.roofline import describe, measure
from benchmarks.timing import require_device
from llmqat_kernels import KVCache, use_backend
from llmqat_kernels.testing import assert_within_ratio

CONTEXTS = tuple(1024 << i for i in range(8))
BATCHES = (1, 2, 4, 8, 16, 32, 64)
FIRST = ((8192, 16), (32768, 4), (8192, 1), (131072, 1), (32768, 16), (131072, 4))
"""What is measured first: the bars begin at 8k."""
FLEX_CONTEXTS = (8192, 32768)
FORMS = tuple((bits, mode) for mode in ("paper", "serving") for bits in (8, 4))
KERNELS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FLEX = "FlexAttention"
AGREEMENT = 2e-2
MEMORY_SHARE = 0.8
PAGE = 64
"""Tokens of a page of the paged form."""
PAGED = ("cuda", "reference")
"""Backends with a paged form."""
DIM = 128
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Heads:
    """Query and KV heads, and their width."""

    name: str
    query: int
    kv: int
    dim: int = DIM


MHA, GQA = Heads("MHA", 32, 32), Heads("GQA", 32, 8)
TINY = (Heads("MHA", 2, 2, 16), Heads("GQA", 4, 2, 16))


@dataclass(frozen=True)
class Work:
    """One cell: heads, tokens of each sequence, sequences."""

    heads: Heads
    tokens: int
    batch: int

    def cost(self, bits: int, mode: str = "serving") -> Cost:
        """Codes and scales of every token once, q and the result once; 4 H T D operations each."""
        h = self.heads
        scales = 0 if bits == 16 else 8 * (1 if mode == "paper" else h.kv)
        cache = self.batch * self.tokens * (2 * h.kv * h.dim * bits // 8 + scales)
        rows = self.batch * h.query * h.dim
        return Cost(cache + 4 * rows, 4 * rows * self.tokens)

    @property
    def memory(self) -> int:
        """Bytes of a cell with a copy of everything, and of an fp32 sequence while it is built."""
        # The `paper` forms once more, in pages.
        forms = sum(self.cost(b, m).bytes * (2 if m == "paper" else 1) for b, m in FORMS)
        h = self.heads
        return self.cost(16).bytes + forms + 24 * self.tokens * h.kv * h.dim


def kv_capacity(bits: int, mode: str = "paper", heads: Heads = MHA, tokens: int = 2048) -> float:
    """Tokens that fit where one bf16 token did, scales included: bytes as allocated."""

    def size(width: int) -> int:
        return KVCache.allocate(
            1, heads.kv, tokens, heads.dim, bits=width, mode=mode, device="meta", dtype=BF16
        ).nbytes

    return size(16) / size(bits)


def random_cache(work: Work, bits: int, mode: str, device: torch.device) -> KVCache:
    """A full cache of random codes: filled through the operators it would take longer than read."""
    h = work.heads
    cache = KVCache.allocate(
        work.batch, h.kv, work.tokens, h.dim, bits=bits, mode=mode, device=device
    )
    random_cache_codes(cache, seed=bits)
    return cache


def random_cache_codes(cache: KVCache, seed: int) -> None:
    """Fill a quantized cache with codes and scales of values up to about 2."""
    bits, device = cache.bits, cache.k_codes.device
    generator = torch.Generator(device).manual_seed(seed)
    for codes, scale in ((cache.k_codes, cache.k_scale), (cache.v_codes, cache.v_scale)):
        if bits == 8:
            codes.random_(-127, 128, generator=generator)
        else:  # every code but -8, which no quantizer writes
            codes.random_(0, 225, generator=generator)
            low, high = codes % 15 + 1, codes.div_(15, rounding_mode="floor").add_(1)
            codes.copy_(low.bitwise_xor_(8) | (high.bitwise_xor_(8) << 4))
        scale.uniform_(0.5, 1.5, generator=generator).mul_(2.0 / (127 if bits == 8 else 7))


def tables(tokens: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin fp32 [T, D / 2] of RoPE with base 10,000."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


class Setup:
    """Tensors of one cell. Baselines attend over the values of the first form."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        h = work.heads
        self.q = normal(work.batch, h.query, h.dim, seed=2, dtype=BF16, device=device)
        self.cos, self.sin = tables(work.tokens, h.dim, device)
        self.lengths = torch.full((work.batch,), work.tokens, device=device)
        self.slots = torch.arange(work.batch, device=device)
        self.scaling = h.dim**-0.5
        self.caches = {form: random_cache(work, *form, device) for form in FORMS}
        self.pools = {form: Pool(partial(self._clone, form)) for form in FORMS}
        self._dense: tuple[Tensor, Tensor] | None = None
        self.dense = Pool(self._make_dense)

    def _clone(self, form: tuple[int, str]) -> KVCache:
        cache = self.caches[form]
        parts = (cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale)
        return KVCache(*(part.clone() for part in parts), cache.bits, cache.mode)

    def values(
        self, form: tuple[int, str], slot: int, heads: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values fp32 [heads, T, D] that the cache of ``form`` stands for."""
        cache = self.caches[form]
        found = []
        for codes, scale in ((cache.k_codes, cache.k_scale), (cache.v_codes, cache.v_scale)):
            part = codes[slot, heads]
            wide = eager.unpack_int4(part) if cache.bits == 4 else part
            own = scale[slot] if cache.mode == "paper" else scale[slot, heads]
            found.append(eager.dequantize(wide, own.expand(wide.shape[:-1]), torch.float32))
        if cache.pre_rope:
            found[0] = eager.rotate(found[0], self.cos, self.sin)
        return found[0], found[1]

    def _make_dense(self) -> tuple[Tensor, Tensor]:
        if self._dense is not None:
            return self._dense[0].clone(), self._dense[1].clone()
        h, work = self.work.heads, self.work
        shape = (work.batch, h.kv, work.tokens, h.dim)
        key, value = (torch.empty(shape, dtype=BF16, device=self.device) for _ in range(2))
        for slot in range(work.batch):
            key[slot], value[slot] = self.values(FORMS[0], slot)
        self._dense = key, value
        return self._dense

    def decode(self, cache: KVCache) -> Tensor:
        """Our operator on every sequence."""
        return qk.attention_decode(
            self.q, cache, self.cos, self.sin, self.slots, self.lengths, scaling=self.scaling
        )

    def paged(self, cache: KVCache) -> Call:
        """The same attention over pages of 64 tokens in random order."""
        work, pages = self.work, self.work.tokens // PAGE
        count = work.batch * pages
        generator = torch.Generator(self.device).manual_seed(0)
        place = torch.randperm(count, generator=generator, device=self.device)
        order = place.argsort()  # which part lies in each page

        def cut(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            heads, width = codes.shape[1], codes.shape[3]
            parts = codes.view(work.batch, heads, pages, PAGE, width).transpose(1, 2)
            if cache.mode == "paper":
                scales = scale.view(count, PAGE)
            else:
                scales = scale.view(work.batch, heads, pages, PAGE).transpose(1, 2)
                scales = scales.reshape(count, heads, PAGE)
            return parts.reshape(count, heads, PAGE, width)[order], scales[order]

        parts = (*cut(cache.k_codes, cache.k_scale), *cut(cache.v_codes, cache.v_scale))
        table = place.view(work.batch, pages).int()
        return lambda: torch.ops.llmqat.attention_decode_paged(
            self.q, *parts, table, self.cos, self.sin, self.slots, self.lengths, work.tokens,
            self.scaling, cache.bits, cache.pre_rope,
        )  # fmt: skip

    def checks(self) -> list[tuple[int, int]]:
        """Sequences and KV heads that are compared: first and last."""
        pairs = ((0, 0), (self.work.batch - 1, self.work.heads.kv - 1))
        return list(dict.fromkeys(pairs))

    def exact(self, form: tuple[int, str], slot: int, head: int) -> Tensor:
        """fp64 result [group, D] of one KV head of one sequence."""
        key, value = self.values(form, slot, slice(head, head + 1))
        q = self.group(self.q, slot, head).double()
        weights = (q @ key[0].double().T * self.scaling).softmax(-1)
        return weights @ value[0].double()

    def group(self, x: Tensor, slot: int, head: int) -> Tensor:
        """The rows of x [n, H, D] that belong to one KV head of one sequence."""
        size = self.work.heads.query // self.work.heads.kv
        return x[slot, head * size : (head + 1) * size]

    def reference(self, form: tuple[int, str], slot: int, head: int) -> Tensor:
        """The reference backend on that KV head alone, [group, D]."""
        cache = self.caches[form]

        def cut(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            own = scale[slot : slot + 1]
            if cache.mode == "serving":
                own = own[:, head : head + 1]
            return codes[slot : slot + 1, head : head + 1].contiguous(), own.contiguous()

        parts = (*cut(cache.k_codes, cache.k_scale), *cut(cache.v_codes, cache.v_scale))
        alone = KVCache(*parts, cache.bits, cache.mode)
        with use_backend("reference"):
            return qk.attention_decode(
                self.group(self.q, slot, head).unsqueeze(0).contiguous(), alone, self.cos,
                self.sin, self.slots[:1], self.lengths[:1], scaling=self.scaling,
            )[0]  # fmt: skip


def ours(setup: Setup, backend: str) -> dict[str, Candidate]:
    """Every form of the cache on one backend."""
    found = {}
    for form in FORMS:
        bits, mode = form

        def make(count: int, form: tuple[int, str] = form, paged: bool = False) -> list[Call]:
            found = setup.pools[form].take(count)
            calls = [setup.paged(c) if paged else partial(setup.decode, c) for c in found]
            return [without_gradient(with_backend(backend, call)) for call in calls]

        def gate(call: Call, form: tuple[int, str] = form) -> None:
            result = call()
            for slot, head in setup.checks():
                assert_within_ratio(
                    setup.group(result, slot, head),
                    setup.reference(form, slot, head),
                    setup.exact(form, slot, head),
                )

        name = f"{backend} KV{bits} {mode}"
        cost = setup.work.cost(bits, mode)
        found[name] = Candidate(make, cost, gate=gate)
        if mode == "paper" and setup.work.tokens % PAGE == 0 and backend in PAGED:
            found[f"{name} paged"] = Candidate(partial(make, paged=True), cost, gate=gate)
    return found


def baselines(setup: Setup) -> dict[str, Candidate]:
    """torch's attention on bf16 keys and values."""
    q = setup.q.unsqueeze(2)
    gqa = setup.work.heads.query != setup.work.heads.kv

    def near(call: Call) -> None:
        for slot, head in setup.checks():
            exact = setup.exact(FORMS[0], slot, head)
            theirs = setup.group(call().squeeze(2), slot, head)
            check_agreement("result", theirs, exact, AGREEMENT)

    def sdpa(kernel: SDPBackend, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                q, key, value, scale=setup.scaling, enable_gqa=gqa
            )

    def on_copies(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], list[Call]]:
        return lambda count: [
            without_gradient(partial(function, *pair)) for pair in setup.dense.take(count)
        ]

    def flex(count: int) -> list[Call]:
        return on_copies(flex_decode(setup, q, gqa))(count)

    cost = setup.work.cost(16)
    found = {
        name: Candidate(on_copies(partial(sdpa, kernel)), cost, BASELINE, near)
        for name, kernel in KERNELS.items()
        if name != "SDPA math" or setup.device.type == "cpu"
    }
    found[FLEX] = Candidate(flex, cost, BASELINE, near)
    return found


def flex_decode(setup: Setup, q: Tensor, gqa: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """FlexAttention compiled for these shapes.

    Raises:
        RuntimeError: where it is not measured, with the reason.
    """
    if setup.device.type != "cuda":
        raise RuntimeError("needs a CUDA device: it is compiled there")
    if setup.work.tokens not in FLEX_CONTEXTS or setup.work.batch not in (1, 4, 16):
        raise RuntimeError("compiled at contexts 8k and 32k and batches 1, 4 and 16 only")
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda key, value: compiled(q, key, value, scale=setup.scaling, enable_gqa=gqa)


def plan(quick: bool, tiny: bool) -> list[Work]:
    """Cells, the most important first."""
    if tiny:
        sizes, heads = [(128, 2), (5, 1)], TINY
    else:
        others = [(t, n) for t in CONTEXTS for n in (1, 16, 4, 64, 8, 2, 32)]
        sizes, heads = list(dict.fromkeys([*FIRST, *others])), (MHA, GQA)
    found = [Work(h, tokens, batch) for tokens, batch in sizes for h in heads]
    return found[:2] if quick else found


def fits(work: Work, device: torch.device) -> bool:
    """Whether a cell fits the free memory."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return work.memory <= MEMORY_SHARE * free


def run_sweep(args: argparse.Namespace, device: torch.device) -> int:
    """Every cell within the budget; the exit status."""
    recorder = cells.Recorder("attention", device, args.save, args.results)
    roofline = measure(device, cells.timer_of(device), 0.002 if args.quick else 0.02)
    print(describe(roofline))
    for bits, bar in ((8, 1.998), (4, 3.99)):
        print(f"capacity of a paper KV{bits} cache: {kv_capacity(bits):.3f}x of bf16 (bar {bar}x)")
    too_large = []
    for work in cells.within(args.budget, plan(args.quick, device.type == "cpu"), "cells"):
        cuda.release(device)
        cell = {"heads": work.heads.name, "context": work.tokens, "batch": work.batch}
        if not fits(work, device):
            too_large.append(f"{work.heads.name} {work.tokens} x {work.batch}")
            continue
        setup = Setup(work, device)
        found: dict[str, Candidate] = {}
        for backend in cells.BACKENDS[device.type]:
            found |= ours(setup, backend)
        found = cells.wanted(found | baselines(setup), args.skip)
        measured = cells.measure(found, device, args.rounds)
        recorder.add(cells.rows_of("attention", cell, found, measured, roofline))
        del setup, found
    if too_large:
        print(f"\nDo not fit the memory: {', '.join(too_large)}.")
    return recorder.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Print every cell; `--save` appends to results/attention_<device>.csv. The exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.arguments(parser)
    args = parser.parse_args(argv)
    cells.check_arguments(args)
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    return cells.guarded(lambda: run_sweep(args, device))


if __name__ == "__main__":
    sys.exit(main())
