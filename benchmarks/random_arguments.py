"""Random arguments of every exact operator, for benchmarks/differential.py: sizes, dtypes, bits,
groups, memory layouts, ties, denormals, outliers, NaN and Inf rows. A seed gives the same arguments
everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmqat_kernels.kv import KVCache
from llmqat_kernels.spec import int4
from llmqat_kernels.spec import quantize as spec
from llmqat_kernels.testing import generator, special_rows

Args = tuple[Any, ...]


class Draw:
    """Random arguments. ``wide``: any size and bits; otherwise few of them, because a device
    compiles a kernel for each.
    """

    def __init__(self, seed: int, wide: bool) -> None:
        self.random = random.Random(seed)
        self.generator = generator(seed)
        self.wide = wide

    def rows(self) -> int:
        return self.random.randint(1, 5)

    def columns(self, most: int = 160) -> int:
        if not self.wide:
            return self.random.choice([n for n in (16, 31, 64, 96, 129) if n <= most])
        return self.random.randint(1, most)

    def bits(self, low: int = 2, high: int = 8) -> int:
        wanted = range(low, high + 1) if self.wide else (max(low, 4), high)
        return self.random.choice(list(wanted))

    def dtype(self) -> torch.dtype:
        kinds = (torch.float32, torch.bfloat16, torch.float16)
        return self.random.choice(kinds if self.wide else kinds[:2])

    def maybe(self, value: Any, other: Any = None) -> Any:
        return value if self.random.random() < 0.5 else other

    def groups(self) -> tuple[int, int]:
        """Columns and group size (-1: whole rows)."""
        if self.random.random() < 0.5:
            return self.columns(), -1
        size = self.random.choice((8, 16, 24, 32) if self.wide else (32,))
        return size * self.random.randint(1, 4), size

    def x(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Float rows: magnitudes of any size, some rows special, some layouts strided."""
        x = torch.randn(rows, columns, generator=self.generator)
        x *= 10.0 ** torch.randint(-6, 4, (rows, 1), generator=self.generator).float()
        if self.random.random() < 0.3:
            special = special_rows(columns, dtype).float()
            for row in range(rows):
                if self.random.random() < 0.6:
                    x[row] = special[self.random.randrange(len(special))]
        return self.layout(x.to(dtype))

    def layout(self, x: Tensor) -> Tensor:
        """The same values, one time in three in another memory layout."""
        kind = self.random.randrange(9)
        if kind == 0:
            return x.t().contiguous().t()
        if kind == 1:
            wide = x.new_zeros((x.shape[0], 2 * x.shape[1]))
            wide[:, ::2] = x
            return wide[:, ::2]
        if kind == 2:
            flat = x.new_zeros(x.numel() + 3)
            flat[3:] = x.reshape(-1)
            return flat[3:].view(x.shape)
        return x

    def codes(self, rows: int, columns: int, bits: int = 8) -> Tensor:
        limit = spec.qmax(bits)
        size = (rows, columns)
        if self.random.random() < 0.1:
            return torch.full(size, limit, dtype=torch.int8)
        return torch.randint(-limit, limit + 1, size, generator=self.generator, dtype=torch.int8)

    def scale(self, *size: int) -> Tensor:
        scale = torch.rand(size, generator=self.generator) * 0.1 + 1e-4
        if self.random.random() < 0.05 and scale.numel():
            scale.view(-1)[0] = float("nan")
        return scale

    def bias(self, n: int, dtype: torch.dtype) -> Tensor | None:
        kind = self.random.choice((dtype, torch.float32))
        return self.maybe(torch.randn(n, generator=self.generator).to(kind))

    def tables(self, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
        angle = torch.rand(tokens, dim // 2, generator=self.generator) * 6.3
        return angle.cos(), angle.sin()

    def heads(self) -> tuple[int, int, int]:
        """Tokens, heads, head dimension."""
        dims = range(2, 66, 2) if self.wide else (64,)
        heads = self.random.randint(1, 2)
        return self.random.randint(1, 2), heads, self.random.choice(list(dims))


def _quantize(d: Draw) -> Args:
    columns, group = d.groups()
    return d.x(d.rows(), columns, d.dtype()), d.bits(), group, d.maybe(True, False)


def _dequantize(d: Draw) -> Args:
    (columns, group), rows = d.groups(), d.rows()
    scale = d.scale(rows) if group == -1 else d.scale(rows, columns // group)
    return d.codes(rows, columns), scale, group, d.dtype()


def _fake_quantize(d: Draw) -> Args:
    x, bits, group, bf16_scale = _quantize(d)
    return x, bits, group, d.maybe(2.0), bf16_scale


def _fake_quantize_channels(d: Draw) -> Args:
    size = d.random.choice((1, 4, 7, 32) if d.wide else (1, 4))
    x = d.x(d.rows(), size * d.random.randint(1, 40), d.dtype())
    return x, d.bits(), size, d.maybe(1.0)


def _fake_quantize_backward(d: Draw) -> Args:
    rows, columns, dtype = d.rows(), d.columns(), d.dtype()
    return d.x(rows, columns, dtype), d.x(rows, columns, dtype), d.maybe(2.0, 0.25)


def _weight(d: Draw, n: int, columns: int, group: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Stored weight, scale, bits, int8 codes."""
    bits = d.bits()
    codes = d.codes(n, columns, bits)
    scale = d.scale(n) if group == -1 else d.scale(n, columns // group)
    return (int4.pack_int4(codes) if bits == 4 else codes), scale, bits, codes


def _int_matmul(d: Draw) -> Args:
    columns = d.columns()
    w, _, bits, _ = _weight(d, d.columns(48), columns, -1)
    return d.codes(d.rows(), columns), w, bits


def _quantized_matmul(d: Draw, stacked: int = 1) -> Args:
    (columns, group), rows, n, dtype = d.groups(), d.rows(), d.columns(48), d.dtype()
    n *= stacked
    w, scale, bits, _ = _weight(d, n, columns, group)
    a = d.codes(rows, columns)
    return a, d.scale(rows), w, scale, d.bias(n, dtype), bits, group, dtype


def _repacked_matmul(d: Draw, stacked: int = 1) -> Args:
    a, a_scale, w, scale, bias, bits, group, dtype = _quantized_matmul(d, stacked)
    return a, a_scale, w, scale, bias, w.shape[0], bits, group, dtype


def _repacked_matmul_add(d: Draw) -> Args:
    *product, bias, n, bits, group, dtype = _repacked_matmul(d)
    residual = d.x(product[0][..., 0].numel(), n, dtype).view(*product[0].shape[:-1], n)
    return *product, bias, residual, n, bits, group


def _quantized_linear(d: Draw) -> Args:
    (columns, group), n, dtype = d.groups(), d.columns(48), d.dtype()
    w, scale, bits, _ = _weight(d, n, columns, group)
    return d.x(d.rows(), columns, dtype), w, scale, d.bias(n, dtype), bits, d.bits(), group


def _qat_linear(d: Draw) -> Args:
    (columns, group), n, dtype = d.groups(), d.columns(48), d.dtype()
    weight = d.x(n, columns, dtype)
    codes, scale = spec.quantize(weight, d.bits(), group, True)
    x = d.x(d.rows(), columns, dtype)
    return x, weight, codes, scale, d.bias(n, dtype), d.bits(), group, None


def _qat_matmul(d: Draw) -> Args:
    x, weight, codes, scale, bias, bits, group, _ = _qat_linear(d)
    multiplier = None
    if group != -1 and d.maybe(True):
        codes, multiplier, scale = spec.quantize_integer_groups(weight, d.bits(2, 4), group)
    return x, *spec.quantize(x, bits), weight, codes, scale, multiplier, bias, group, None


def _silu_mul_qat_matmul(d: Draw) -> Args:
    gate, _, _, *linear = _qat_matmul(d)
    return gate, d.x(*gate.shape, gate.dtype), d.bits(), *linear


def _quantize_integer_groups(d: Draw) -> Args:
    size = d.random.choice((8, 16, 32) if d.wide else (32,))
    x = d.x(d.random.randint(1, 3), size * d.random.randint(1, 4), d.dtype())
    return x, d.bits(2, 4), size


def _integer_group_matmul(d: Draw) -> Args:
    size = d.random.choice((8, 16, 32) if d.wide else (32,))
    rows, n, groups, dtype = d.rows(), d.columns(48), d.random.randint(1, 4), d.dtype()
    bits = d.bits(2, 4)
    codes = d.codes(n, size * groups, bits)
    w = d.maybe(int4.pack_int4(codes), codes)
    multiplier = torch.randint(1, 64, (n, groups), generator=d.generator).to(torch.uint8)
    a = d.codes(rows, size * groups)
    return a, d.scale(rows), w, multiplier, d.scale(n), d.bias(n, dtype), size, dtype


def _rms_norm(d: Draw) -> Args:
    columns, dtype = d.columns(), d.dtype()
    weight = torch.randn(columns, generator=d.generator).to(d.random.choice((dtype, torch.float32)))
    return d.x(d.rows(), columns, dtype), weight, d.random.choice((1e-5, 1e-6))


def _rms_norm_quantize(d: Draw) -> Args:
    x, weight, eps = _rms_norm(d)
    residual = d.maybe(d.x(*x.shape, x.dtype))
    return x, weight, eps, d.bits(), residual


def _silu_mul(d: Draw) -> Args:
    rows, columns, dtype = d.rows(), d.columns(), d.dtype()
    return d.x(rows, columns, dtype), d.x(rows, columns, dtype)


def _rope(d: Draw) -> Args:
    (n, heads, dim), dtype = d.heads(), d.dtype()
    x = d.x(n * heads, dim, dtype).reshape(n, heads, dim)
    positions = torch.randint(0, 9, (n,), generator=d.generator)
    return x, *d.tables(9, dim), positions


def _rope_fake_quantize(d: Draw) -> Args:
    k, cos, sin, positions = _rope(d)
    v = d.x(k.shape[0] * k.shape[1], k.shape[2], k.dtype).reshape(k.shape)
    bits = d.random.choice((d.bits(), d.bits(), 16))
    return k, v, cos, sin, positions, bits, d.maybe(True, False), None


def _rope_quantize_append(d: Draw) -> Args:
    k, v, cos, sin, positions, _, pre_rope, _ = _rope_fake_quantize(d)
    bits = d.random.choice((4, 8, 16))
    mode = "paper" if pre_rope else "serving"
    sizes = (k.shape[0] + 1, k.shape[1], cos.shape[0], k.shape[2])
    cache = KVCache.allocate(*sizes, bits=bits, mode=mode, dtype=k.dtype)
    slots = torch.randperm(sizes[0], generator=d.generator)[: k.shape[0]]
    tensors = (cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale)
    return k, v, cos, sin, *tensors, slots, positions, bits, cache.pre_rope


def _sample(d: Draw) -> Args:
    n, vocabulary = d.random.randint(1, 2), d.columns(300) + 1
    logits = d.x(n, vocabulary, d.dtype())
    record, step = (torch.randint(0, 2**40, (n,), generator=d.generator) for _ in range(2))
    greedy = torch.rand(n, generator=d.generator) < 0.3
    top_k = d.random.choice((0, 0, 1, 5, 50))
    return logits, record, step, greedy, d.random.randrange(2**60), d.maybe(1.0, 0.7), top_k


DRAWS: dict[str, Callable[[Draw], Args]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "fake_quantize": _fake_quantize,
    "fake_quantize_channels": _fake_quantize_channels,
    "fake_quantize_backward": _fake_quantize_backward,
    "int_matmul": _int_matmul,
    "quantized_matmul": _quantized_matmul,
    "repacked_matmul": _repacked_matmul,
    "repacked_matmul_silu_mul": lambda d: _repacked_matmul(d, stacked=2),
    "repacked_matmul_add": _repacked_matmul_add,
    "quantized_linear": _quantized_linear,
    "qat_linear": _qat_linear,
    "qat_matmul": _qat_matmul,
    "silu_mul_qat_matmul": _silu_mul_qat_matmul,
    "quantize_integer_groups": _quantize_integer_groups,
    "integer_group_matmul": _integer_group_matmul,
    "rms_norm": _rms_norm,
    "rms_norm_quantize": _rms_norm_quantize,
    "rms_norm_quantize_train": lambda d: (*_rms_norm_quantize(d), d.maybe(True, False)),
    "silu_mul": _silu_mul,
    "silu_mul_quantize": lambda d: (*_silu_mul(d), d.bits()),
    "silu_mul_quantize_train": lambda d: (*_silu_mul(d), d.bits(), d.maybe(True, False)),
    "rope": _rope,
    "rope_fake_quantize": _rope_fake_quantize,
    "rope_quantize_append": _rope_quantize_append,
    "sample": _sample,
}
"""Every exact operator but int4 packing, which has no Triton kernel: it is part of the others."""
