"""Products of one decoder layer at every batch size: ours against cuBLAS and other packages.

    python -m benchmarks.gemm --device cuda [--quick] [--save] [--models llama-7b] [--budget 110]

The four fused shapes (q, k and v; o; gate and up; down) of LLaMA 7B, 13B and 30B at M = 1 to 4096,
on the backends `cuda` and `triton` side by side. Weights rotate past the L2 cache, calls are CUDA
graphs, candidates take turns. Before its time counts, every integer form is compared with the
specification bit for bit (the first and the last rows) and with a second run of itself; W4A16 by
the 2x rule; a baseline within 30 %. Ours take codes, as in the runtime, where the norm or SwiGLU
before a product writes them; `+ quantize` adds quantizing bf16 activations, as in other packages.
On a CPU: tiny sizes, the backends `cpu` and `reference`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmqat_kernels as qk
from benchmarks import cells, cuda, eager, optional, tinygemm
from benchmarks.cells import BASELINE, Candidate, Pool, with_backend, without_gradient
from benchmarks.entry import OTHER_GRID, Call, Cost, check_agreement, normal
from benchmarks.roofline import describe, measure
from benchmarks.timing import require_device
from llmqat.models.shapes import find_shape
from llmqat_kernels.spec import linear as spec
from llmqat_kernels.spec.activation import silu_mul
from llmqat_kernels.testing import assert_same_bits, assert_within_ratio

FIRST = (1, 16)
FEW = (8, 2, 4, 32, 64)
MANY = (128, 256, 512, 1024, 2048, 4096)
LAYERS = ("qkv", "o", "gate_up", "down")
MODELS = ("llama-7b", "llama-13b", "llama-30b")
CUBLAS, INT_MM, TINYGEMM = "F.linear bf16", "torch._int_mm + scale", "tinygemm int4"
"""On CUDA the first two are cuBLAS."""
GROUP = 128
EDGE = 16
"""Rows at the beginning and at the end that are compared with the specification: a row does not
depend on the others, and the first and last ones lie in different tiles."""
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Layer:
    """One fused linear: N outputs, K inputs."""

    model: str
    name: str
    n: int
    k: int

    def cost(
        self, rows: int, w_bits: int, in_bits: int, integer: bool | None = None, extra: int = 0
    ) -> Cost:
        """Weight and its scales, input (with scales where it is codes), result in bf16, each once.

        ``integer``: the product is one of codes; None: where the input is.
        """
        weight = self.n * self.k * w_bits // 8 + (4 * self.n if w_bits < 16 else 0) + extra
        inputs = rows * self.k * in_bits // 8 + (4 * rows if in_bits < 16 else 0)
        work, traffic = 2 * rows * self.n * self.k, weight + inputs + 2 * rows * self.n
        return Cost(traffic, 0, work) if integer or in_bits < 16 else Cost(traffic, work)


def layers_of(model: str) -> list[Layer]:
    """The four fused linears of a released LLaMA, or of ``tiny``."""
    if model == "tiny":
        hidden, inner, qkv = 64, 128, 192
    else:
        fields = find_shape(model).fields
        hidden, inner = fields["hidden_size"], fields["intermediate_size"]
        heads, kv = fields["num_attention_heads"], fields["num_key_value_heads"]
        qkv = hidden // heads * (heads + 2 * kv)
    sizes = ((qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    return [Layer(model, name, n, k) for name, (n, k) in zip(LAYERS, sizes, strict=True)]


class Weights:
    """One weight in every form that a candidate reads; the copies are made when first asked for."""

    def __init__(self, layer: Layer, device: torch.device, backends: Sequence[str]) -> None:
        self.layer, self.device = layer, device
        weight = normal(layer.n, layer.k, seed=1, dtype=torch.float32, device=device)
        self.codes, self.scale = qk.quantize(weight, 4, scale_dtype=BF16)
        self.codes8, self.scale8 = qk.quantize(weight, 8, scale_dtype=BF16)
        self.packed = qk.pack_int4(self.codes)
        self.group = min(GROUP, layer.k // 2)
        self.grouped = qk.quantize_integer_groups(weight, 4, group_size=self.group)
        self.dense = eager.dequantize(self.codes, self.scale, BF16)
        self.pools = {CUBLAS: Pool(self.dense.clone), INT_MM: Pool(self.codes8.clone)}
        self.pools[TINYGEMM] = Pool(self._tinygemm)
        for bits in (4, 8):
            a_type = "int8"
            self.pools[f"humming W{bits}A8"] = Pool(
                partial(optional.humming_layer, self.dense, bits, a_type)
            )
            codes, scale = (self.codes, self.scale) if bits == 4 else (self.codes8, self.scale8)
            self.pools[f"gemlite W{bits}A8"] = Pool(
                partial(optional.gemlite_layer, codes, scale, bits, BF16)
            )
            for backend in backends:
                w = self.packed if bits == 4 else self.codes8
                self.pools[f"{backend} W{bits}"] = Pool(
                    with_backend(backend, partial(qk.repack_weight, w, bits))
                )
        self.pools["humming W4A16"] = Pool(
            partial(optional.humming_layer, self.dense, 4, "bfloat16")
        )
        self.pools["grouped"] = Pool(self._grouped)

    def _tinygemm(self) -> Callable[[Tensor], Tensor]:
        return tinygemm.linear(*tinygemm.pack(self.codes, self.scale), self.layer.k)

    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        codes, multiplier, scale = self.grouped
        return qk.pack_int4(codes), multiplier.clone(), scale.clone()


class Inputs:
    """Activations of one M, as floats and as codes."""

    def __init__(self, layer: Layer, rows: int, device: torch.device) -> None:
        self.x = normal(rows, layer.k, seed=2, dtype=BF16, device=device)
        self.a, self.a_scale = qk.quantize(self.x, 8)
        narrow, self.a4_scale = qk.quantize(self.x, 4)
        self.a4 = qk.pack_int4(narrow)
        ends = {*range(min(EDGE, rows)), *range(max(0, rows - EDGE), rows)}
        self.edge = torch.tensor(sorted(ends), device=device)


def same_as(expected: Callable[[], Tensor], edge: Tensor) -> cells.Gate:
    """Gate: a second run gives the same bits, and the rows ``edge`` are those of the spec."""

    def gate(call: Call) -> None:
        first = call()
        assert_same_bits(call(), first, "a second run")
        assert_same_bits(first[edge], expected(), "rows")

    return gate


def near(expected: Tensor, edge: Tensor, tolerance: float = OTHER_GRID) -> cells.Gate:
    """Gate of a baseline: the same product, on whatever grid."""
    return lambda call: check_agreement("result", call()[edge], expected, tolerance)


def ours(weights: Weights, inputs: Inputs, backend: str) -> dict[str, Candidate]:
    """Our forms on one backend."""
    layer, rows = weights.layer, inputs.x.shape[0]
    edge, n = inputs.edge, layer.n
    a, a_scale = inputs.a[edge], inputs.a_scale[edge]

    def on(make: Callable[[int], list[Call]]) -> Callable[[int], Sequence[Call]]:
        return lambda count: [without_gradient(with_backend(backend, c)) for c in make(count)]

    def product(bits: int, scale: Tensor, quantize: bool, layout: Tensor) -> Call:
        def call() -> Tensor:
            codes, rows_scale = inputs.a, inputs.a_scale
            if quantize:
                codes, rows_scale = qk.quantize(inputs.x, 8)
            return qk.repacked_matmul(
                codes, rows_scale, layout, scale, n=n, w_bits=bits, dtype=BF16
            )

        return call

    found: dict[str, Candidate] = {}
    for bits, w, scale in (
        (4, weights.packed, weights.scale),
        (8, weights.codes8, weights.scale8),
    ):
        pool = weights.pools[f"{backend} W{bits}"]
        expected = partial(spec.quantized_matmul, a, a_scale, w, scale, None, bits, -1, BF16)
        for quantize in (False, True) if bits == 4 else (False,):
            found[f"{backend} W{bits}A8" + (" + quantize" if quantize else "")] = Candidate(
                on(
                    lambda count, p=pool, b=bits, s=scale, q=quantize: [  # type: ignore[misc]
                        product(b, s, q, layout) for layout in p.take(count)
                    ]
                ),
                layer.cost(rows, bits, 16 if quantize else 8, integer=True),
                gate=same_as(expected, edge),
            )
    found[f"{backend} W4A4 groups"] = _groups(weights, inputs, on)
    found[f"{backend} W4A16"] = _float_activations(weights, inputs, on, backend)
    if layer.name == "gate_up":
        found[f"{backend} W4A8 SwiGLU"] = _swiglu(weights, inputs, on, backend)
    return found


def _groups(weights: Weights, inputs: Inputs, on: Callable[..., Any]) -> Candidate:
    layer, rows, group = weights.layer, inputs.x.shape[0], weights.group

    def make(count: int) -> list[Call]:
        return [
            partial(
                qk.integer_group_matmul,
                inputs.a4, inputs.a4_scale, *w, group_size=group, dtype=BF16,
            )
            for w in weights.pools["grouped"].take(count)
        ]  # fmt: skip

    def expected() -> Tensor:
        edge = inputs.edge
        codes, multiplier, scale = weights.grouped
        return spec.integer_group_matmul(
            qk.unpack_int4(inputs.a4[edge], layer.k), inputs.a4_scale[edge], codes, multiplier,
            scale, None, group, BF16,
        )  # fmt: skip

    extra = layer.n * (layer.k // group)
    return Candidate(
        on(make), layer.cost(rows, 4, 4, extra=extra), gate=same_as(expected, inputs.edge)
    )


def _float_activations(
    weights: Weights, inputs: Inputs, on: Callable[..., Any], backend: str
) -> Candidate:
    layer, edge = weights.layer, inputs.edge

    def make(count: int) -> list[Call]:
        return [
            partial(qk.repacked_linear, inputs.x, layout, weights.scale, n=layer.n, w_bits=4)
            for layout in weights.pools[f"{backend} W4"].take(count)
        ]

    def gate(call: Call) -> None:
        x = inputs.x[edge]
        exact = x.double() @ weights.dense.double().T
        assert_within_ratio(call()[edge], F.linear(x, weights.dense), exact, slack=1e-2)

    return Candidate(on(make), layer.cost(inputs.x.shape[0], 4, 16), gate=gate)


def _swiglu(weights: Weights, inputs: Inputs, on: Callable[..., Any], backend: str) -> Candidate:
    """The gate and up product that ends in SiLU(gate) * up."""
    layer, edge = weights.layer, inputs.edge

    def make(count: int) -> list[Call]:
        return [
            partial(
                qk.repacked_matmul_silu_mul,
                inputs.a, inputs.a_scale, layout, weights.scale, n=layer.n, w_bits=4, dtype=BF16,
            )
            for layout in weights.pools[f"{backend} W4"].take(count)
        ]  # fmt: skip

    def expected() -> Tensor:
        both = spec.quantized_matmul(
            inputs.a[edge], inputs.a_scale[edge], weights.packed, weights.scale, None, 4, -1, BF16
        )
        return silu_mul(*(half.contiguous() for half in both.chunk(2, -1)))

    full = layer.cost(inputs.x.shape[0], 4, 8)
    saved = inputs.x.shape[0] * layer.n
    return Candidate(
        on(make), Cost(full.bytes - saved, 0, full.int_ops), gate=same_as(expected, edge)
    )


def baselines(weights: Weights, inputs: Inputs) -> dict[str, Candidate]:
    """What a user would run instead."""
    layer, x, edge = weights.layer, inputs.x, inputs.edge
    rows, device = x.shape[0], weights.device
    exact = F.linear(x[edge], weights.dense)
    both = inputs.a_scale.unsqueeze(-1) * weights.scale8

    def of(pool: str, use: Callable[[Any], Call]) -> Callable[[int], Sequence[Call]]:
        return lambda count: [without_gradient(use(w)) for w in weights.pools[pool].take(count)]

    def candidate(
        pool: str, use: Callable[[Any], Call], w_bits: int, in_bits: int, integer: bool = False
    ) -> Candidate:
        cost = layer.cost(rows, w_bits, in_bits, integer)
        return Candidate(of(pool, use), cost, BASELINE, near(exact, edge))

    def apply(layer: Callable[[Tensor], Tensor]) -> Call:
        return lambda: layer(x)

    found = {
        CUBLAS: candidate(CUBLAS, lambda w: lambda: F.linear(x, w), 16, 16),
        TINYGEMM: candidate(TINYGEMM, apply, 4, 16),
    }
    aligned = layer.n % 8 == 0 and layer.k % 8 == 0
    if device.type == "cpu" or (rows > 16 and aligned):
        found[INT_MM] = candidate(
            INT_MM, lambda w: lambda: eager.int_mm(inputs.a, w, both, BF16), 8, 8
        )
    for name, w_bits in (
        *((f"{package} W{bits}A8", bits) for package in ("humming", "gemlite") for bits in (4, 8)),
        ("humming W4A16", 4),
    ):
        found[name] = candidate(name, apply, w_bits, 16, integer=name.endswith("A8"))
    return found


def plan(
    models: Sequence[str], first: Sequence[int], few: Sequence[int], many: Sequence[int]
) -> list[tuple[Layer, int]]:
    """Layers and M, the most important first: all layers of the first model at the ends of the
    bars' range, then its other sizes, then the other models.
    """
    # A ratio is one of all four products: each of the first M is finished before the next begins.
    blocks = [(models[0], sizes) for sizes in (*((m,) for m in first), few, many)]
    blocks += [(model, sizes) for sizes in ((*first, *few), many) for model in models[1:]]
    return [(layer, m) for model, sizes in blocks for layer in layers_of(model) for m in sizes]


def run_sweep(args: argparse.Namespace, device: torch.device) -> int:
    """Every cell of the plan within the budget; the exit status."""
    tiny = device.type == "cpu"
    models = tuple(args.models) if args.models else ("tiny",) if tiny else MODELS
    sizes: tuple[Sequence[int], ...] = ((1, 3), (5,), (17,)) if tiny else (FIRST, FEW, MANY)
    if args.quick:
        models, sizes = models[:1], (sizes[0], (), ())
    recorder = cells.Recorder("gemm", device, args.save, args.results)
    roofline = measure(device, cells.timer_of(device), 0.002 if args.quick else 0.02)
    print(describe(roofline))
    backends = cells.BACKENDS[device.type]
    weights: Weights | None = None
    for layer, rows in cells.within(args.budget, plan(models, *sizes), "cells"):
        if weights is None or weights.layer != layer:
            weights = None  # the old one goes before the new one comes
            cuda.release(device)
            weights = Weights(layer, device, backends)
        inputs = Inputs(layer, rows, device)
        found: Mapping[str, Candidate] = {
            name: candidate
            for backend in backends
            for name, candidate in ours(weights, inputs, backend).items()
        } | baselines(weights, inputs)
        found = cells.wanted(found, args.skip)
        measured = cells.measure(found, device, args.rounds)
        cell = {"model": layer.model, "layer": layer.name, "M": rows, "N": layer.n, "K": layer.k}
        recorder.add(cells.rows_of("gemm", cell, found, measured, roofline))
    return recorder.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Print every cell; `--save` appends to results/gemm_<device>.csv. The exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.arguments(parser)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "tiny"))
    args = parser.parse_args(argv)
    cells.check_arguments(args)
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    return cells.guarded(lambda: run_sweep(args, device))


if __name__ == "__main__":
    sys.exit(main())
