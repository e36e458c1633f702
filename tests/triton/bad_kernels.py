"""Kernels of which each breaks one gate of `benchmarks.gates`; `python -m tests.triton.bad_kernels`
prints what the gates say, ``{"name arch": [...]}``. Run without TRITON_INTERPRET.
"""

import json

import triton
import triton.language as tl
from triton.language.extra import libdevice

from benchmarks.cubin import ARCHS, compile_variant, measure
from benchmarks.gates import failures
from llmqat_kernels.backends.triton import numerics
from llmqat_kernels.backends.triton.launch import Variant


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, IEEE: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    at_a = a + rows[:, None] * K + inner[None, :]
    at_b = b + columns[None, :] * K + inner[:, None]
    whole: tl.constexpr = a.dtype.element_ty == tl.int8
    total = tl.zeros((M, N), tl.int32 if whole else tl.float32)
    for start in range(0, K, BLOCK):
        x, y = tl.load(at_a + start), tl.load(at_b + start)
        if whole:
            total = tl.dot(x, y, total, out_dtype=tl.int32)
        else:
            total = tl.dot(x, y, total, input_precision="ieee" if IEEE else "tf32")
    tl.store(c + rows[:, None] * N + columns[None, :], total)


@triton.jit
def quotient(x, y, WHICH: tl.constexpr, STRIDE: tl.constexpr):
    at = tl.arange(0, 1024)
    v = tl.load(x + at * STRIDE)
    if WHICH == "fast":
        v = v / (v + 2.0)
    elif WHICH == "flush":
        v = libdevice.rsqrt(v)
    elif WHICH == "inverse":
        v = numerics.near_inverse(v)
    elif WHICH == "fused":
        v = tl.fma(v, v, 1.0)
    else:
        v = tl.div_rn(v, v + 2.0)
    tl.store(y + at, v)


def elementwise(name, which, stride=1, promises=frozenset()):
    signature, constants = {"x": "*fp32", "y": "*fp32"}, {"WHICH": which, "STRIDE": stride}
    return Variant(name, quotient, signature, constants, promises=promises)


def dot(name, dtype, size, block, promises=frozenset(), ieee=True, **options):
    total = "i32" if dtype == "i8" else "fp32"
    return Variant(
        name,
        product,
        {"a": f"*{dtype}", "b": f"*{dtype}", "c": f"*{total}", "K": "i32"},
        {"M": size, "N": size, "BLOCK": block, "IEEE": ieee},
        promises=promises,
        **options,
    )


INT8, FLOAT = frozenset({"int8_mma"}), frozenset({"float_mma"})
WIDE = frozenset({"vector_loads"})
VARIANTS = (
    elementwise("clean", "exact", promises=WIDE),
    dot("clean int8 product", "i8", 128, 64, INT8 | WIDE),
    dot("clean bf16 product", "bf16", 128, 64, FLOAT | WIDE),
    dot("clean fp32 product", "fp32", 32, 32),
    dot("spills", "i8", 256, 64, num_warps=4),
    dot("shared_memory", "i8", 128, 256, num_stages=6),
    elementwise("div_full", "fast"),
    elementwise("ftz", "flush"),
    elementwise("fma", "fused"),
    elementwise("reciprocals", "inverse"),
    elementwise("proven_silu", "inverse", promises=frozenset({"proven_silu"})),
    dot("tf32", "fp32", 64, 32, ieee=False),
    elementwise("vector_loads", "exact", stride=3, promises=WIDE),
    elementwise("int8_mma", "exact", promises=INT8),
    dot("int8_mma small", "i8", 16, 64, INT8),
    elementwise("float_mma", "exact", promises=FLOAT),
)


if __name__ == "__main__":
    said = {}
    for arch in ARCHS:
        kernels = [compile_variant(variant, arch) for variant in VARIANTS]
        for variant, figures in zip(VARIANTS, measure(kernels, arch), strict=True):
            said[f"{variant.name} {arch}"] = failures(figures, arch, variant.promises)
    print(json.dumps(said, indent=1))
