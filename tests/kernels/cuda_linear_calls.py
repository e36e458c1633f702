"""Calls of the CUDA products and of the operators that make their operands.

Sizes are not multiples of anything, so that every tail of a kernel runs, and such that blocks of
threads share a tile and go on from one tile to the next: ``test_cuda_cases.py`` asks the heuristics
whether they do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import llmqat_kernels as qk
from llmqat_kernels.backends.reference import REFERENCE
from tests.emulator.linear import layout
from tests.kernels.cuda_calls import Case

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = FLOATS[1:]
TOKENS = (1, 9, 24, 65)
"""1, 2, 4 and 8 column tiles; 65 are two launches."""
LIMIT = 1e-2
"""Of float products: fp32 sums in another order, then rounded once, to 8 bits or more."""

# N, K. Groups of channels, the last one not full. Up to 8 tokens a group is 32 channels and a stage
# 512 k, beyond 128 channels and 128 k: with these K blocks share the groups, and some have the end
# of one and the beginning of the next. K 96 is one stage, of which each block has a group whole.
FEW, CUT, WHOLE = (150, 4200), (150, 1136), (150, 96)
ODD = (70, 393)
"""Rows of activations that are no multiple of 16 bytes, of int8 as of 16-bit floats."""
SPLIT = (150, 2088)
"""17 stages: two splits of float sums."""
LARGE, LARGE_SPLIT = (1100, 1136), (1100, 4112)
WIDE = (15000, 600)
"""More groups than blocks: they share some, then each has one of its own."""


def quantize() -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, columns in ((3, 1000), (5, 7), (1, 9000), (2, 8191), (0, 8)):
            yield Case((torch.randn(rows, columns).to(dtype), 8))
        yield Case((torch.randn(2, 3, 96).to(dtype), 4, 32, True))


def _codes(n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight."""
    return qk.quantize(torch.randn(n, k), bits)


def repack_weight() -> Iterator[Case]:
    for n, k in (CUT, ODD, (33, 1), (2, 128)):
        for bits in (4, 8):
            codes, _ = _codes(n, k, bits)
            want = layout(codes, bits == 4)
            yield Case((codes, bits), lambda want=want: want)
            if bits == 4:
                yield Case((qk.pack_int4(codes), bits), lambda want=want: want)


def _integer(m: int, size: tuple[int, int], bits: int, number: int, small: bool = True) -> Case:
    """A call of repacked_matmul; ``number`` picks the dtypes of result and bias."""
    n, k = size
    codes, scale = _codes(n, k, bits)
    a, a_scale = qk.quantize(torch.randn(m, k), 8)
    dtype, bias_dtype = FLOATS[number % 3], FLOATS[number // 3 % 3]
    bias = None if number % 4 == 3 else torch.randn(n, dtype=bias_dtype)
    rest = bits, -1, dtype
    return Case(
        (a, a_scale, layout(codes, bits == 4), scale, bias, n, *rest),
        lambda: REFERENCE["quantized_matmul"](a, a_scale, codes, scale, bias, *rest),
        small=small,
    )


def repacked_matmul() -> Iterator[Case]:
    number = 0
    for bits in (4, 8):
        for m in TOKENS:
            yield _integer(m, FEW if m <= 8 else CUT, bits, number)
            number += 1
        for m, size in ((9, ODD), (3, WHOLE), (0, ODD)):
            yield _integer(m, size, bits, number)
            number += 1
        for m, size in ((1, LARGE), (24, LARGE), (65, LARGE), (2, WIDE)):
            yield _integer(m, size, bits, number, small=False)
            number += 1


def repacked_matmul_silu_mul() -> Iterator[Case]:
    for bits in (4, 8):
        for m, dtype in ((9, torch.bfloat16), (24, torch.float32), (2, torch.float16)):
            n, k = FEW if m <= 8 else CUT
            codes, scale = _codes(n, k, bits)
            a, a_scale = qk.quantize(torch.randn(m, k), 8)
            rest = n, bits, -1, dtype
            yield Case(
                (a, a_scale, layout(codes, bits == 4), scale, None, *rest),
                lambda a=a, sx=a_scale, w=codes, sw=scale, rest=rest: REFERENCE[
                    "repacked_matmul_silu_mul"
                ](a, sx, w, sw, None, *rest),
            )


def repacked_matmul_add() -> Iterator[Case]:
    for bits in (4, 8):
        for m, dtype in ((9, torch.bfloat16), (65, torch.float32), (2, torch.float16)):
            n, k = FEW if m <= 8 else CUT
            codes, scale = _codes(n, k, bits)
            a, a_scale = qk.quantize(torch.randn(m, k), 8)
            residual = torch.randn(m, n).to(dtype)
            bias = torch.randn(n) if m == 9 else None
            yield Case(
                (a, a_scale, layout(codes, bits == 4), scale, bias, residual, n, bits, -1),
                lambda given=(a, a_scale, codes, scale, bias, residual, n, bits, -1): REFERENCE[
                    "repacked_matmul_add"
                ](*given),
            )


def _float(m: int, size: tuple[int, int], dtype: torch.dtype, small: bool = True) -> Case:
    """A call of repacked_linear."""
    n, k = size
    codes, scale = _codes(n, k, 4)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n, dtype=dtype)
    # The kernel does not round the weight to x's dtype.
    plain = x.float(), codes, scale, bias, 4, 16
    return Case(
        (x, layout(codes, True), scale, bias, n, 4, -1),
        lambda: REFERENCE["quantized_linear"](*plain).to(dtype),
        LIMIT,
        small,
    )


def repacked_linear() -> Iterator[Case]:
    for dtype in HALVES:
        for m in TOKENS:
            yield _float(m, SPLIT, dtype)
        for m, size in ((3, ODD), (5, WHOLE)):
            yield _float(m, size, dtype)
    for m in (1, 24, 65):
        yield _float(m, LARGE_SPLIT, torch.bfloat16, small=False)


def repacked_linear_add() -> Iterator[Case]:
    for dtype in HALVES:
        for m, size in ((9, SPLIT), (65, WHOLE), (3, ODD)):
            product = _float(m, size, dtype)
            *args, n, bits, group_size = product.args
            residual = torch.randn(m, n).to(dtype)
            yield Case(
                (*args, residual, n, bits, group_size),
                lambda r=residual, product=product: r + product.want(),
                LIMIT,
            )


def quantized_matmul() -> Iterator[Case]:
    for (n, k), m, dtype in ((ODD, 5, torch.float16), (CUT, 24, torch.float32)):
        for bits in (4, 8):
            codes, scale = _codes(n, k, bits)
            a, a_scale = qk.quantize(torch.randn(m, k), 8)
            for w in (codes, qk.pack_int4(codes)) if bits == 4 else (codes,):
                yield Case((a, a_scale, w, scale, None, bits, -1, dtype))


def quantized_linear() -> Iterator[Case]:
    for n, k in (ODD, CUT):
        for bits in (4, 8):
            codes, scale = _codes(n, k, bits)
            x = torch.randn(2, 3, k, dtype=torch.bfloat16)
            for w in (codes, qk.pack_int4(codes)) if bits == 4 else (codes,):
                yield Case((x, w, scale, None, bits, 8))
                if bits == 4:
                    plain = x.float(), codes, scale, None, 4, 16
                    yield Case(
                        (x, w, scale, None, 4, 16),
                        lambda plain=plain: REFERENCE["quantized_linear"](*plain).bfloat16(),
                        LIMIT,
                    )


# M, N, K, group size: both tiles, groups of one and of two MMA steps, K split and whole, tails on
# every side; then what only the kernel for any layout takes.
GROUPS = (
    *((1, 70, 2112, 64), (8, 65, 1280, 128), (3, 70, 320, 64), (2, 130, 384, 128)),
    *((9, 20, 2112, 64), (10, 20, 1280, 128), (65, 70, 192, 64), (70, 130, 384, 128)),
    (3, 5, 45, 15),
)


def integer_group_matmul() -> Iterator[Case]:
    for number, (m, n, k, group_size) in enumerate(GROUPS):
        for a_bits in (4, 8):
            w, multiplier, scale = qk.quantize_integer_groups(
                torch.randn(n, k), 4, group_size=group_size
            )
            a, a_scale = qk.quantize(torch.randn(m, k), a_bits)
            a = qk.pack_int4(a) if a_bits == 4 else a
            bias = torch.randn(n, dtype=FLOATS[number % 3]) if number % 4 else None
            rest = multiplier, scale, bias, group_size, FLOATS[(number + 1) % 3]
            yield Case((a, a_scale, qk.pack_int4(w), *rest))
