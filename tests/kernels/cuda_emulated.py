"""The calls of ``cuda_cases.py`` through the launchers in the emulator, as the bindings make them.

Operators that quantize or lay out an operand on the way are composed of the same launchers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmqat_kernels.spec.int4 import unpack_int4
from tests.emulator import linear, test_attention_decode, test_int4_linear, test_quantize
from tests.emulator import test_repack_weight as repack
from tests.emulator import test_rope_quantize_append as append
from tests.emulator.build import Kernels, compile_kernel
from tests.emulator.kv import cache_of
from tests.kernels.cuda_calls import Case

SMS = 132
"""Of an H100: the very cut of the work."""
ARCHS = {"int4_linear": 90}
"""Where sm_90 has code of its own."""
_pointer, _long, _int, _flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool


_LOADED: dict[str, Kernels] = {}
_hidden = False


def _library(name: str) -> Kernels:
    """A kernel's library with the types of its arguments."""
    library = _loaded(name)
    library.hide_memory(_hidden)
    return library


@functools.cache
def _loaded(name: str) -> Kernels:
    library = compile_kernel(name, ARCHS.get(name, 80))
    if name == "quantize":
        inputs = [_pointer, _int, _long, _long, _long, _int, _flag]
        library.llmqat_cuda_quantize.argtypes = [*inputs, _pointer, _pointer, _pointer]
    elif name == "repack_weight":
        inputs = [_pointer, _flag, _long, _long, _flag]
        library.llmqat_cuda_repack_weight.argtypes = [*inputs, _pointer, _pointer, _pointer]
    elif name == "int4_linear":
        problem = ctypes.POINTER(test_int4_linear.Problem)
        library.plan.argtypes = [_long, _long, _long, _flag, _long, ctypes.POINTER(_long)]
        library.plan.restype = None
        library.llmqat_cuda_int4_linear.argtypes = [problem, _pointer]
        library.llmqat_cuda_int4_is_regular.argtypes = [problem]
        library.llmqat_cuda_int4_is_regular.restype = _flag
    library.use_schedule("shuffled")
    library.take_launches()  # of other tests: one file is one library in a process
    _LOADED[name] = library
    return library


def take_launches() -> int:
    """How many kernels the calls since the last one of this function have started."""
    return sum(library.take_launches() for library in _LOADED.values())


@contextmanager
def hidden_memory() -> Iterator[None]:
    """Within it a kernel that touches a guarded tensor out of turn is an error."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False
        for library in _LOADED.values():
            library.hide_memory(False)


def _quantize(x, bits, group_size=-1, bf16_scale=False):
    rows = x.reshape(-1, x.shape[-1] if group_size == -1 else group_size)
    codes, scale = test_quantize.quantize(_library("quantize"), rows, bits, bf16_scale)
    groups = () if group_size == -1 else (x.shape[-1] // group_size,)
    return codes.view(x.shape), scale.view(*x.shape[:-1], *groups)


def _repack_weight(w, bits):
    packed = w.dtype == torch.uint8
    columns = 2 * w.shape[1] if packed else None
    laid_out, fits = repack.repack(_library("repack_weight"), w, bits <= 4, columns)
    assert fits
    return laid_out


def _product(a, a_scale, packed, w_scale, dtype, nibbles, **options):
    kernel = _library("float_linear" if a_scale is None else "quantized_linear")
    rows = a.reshape(-1, a.shape[-1])
    options |= {"nibbles": nibbles, "sms": SMS}
    y = linear.run(kernel, rows, a_scale, packed, w_scale, dtype, **options)
    return y.view(*a.shape[:-1], y.shape[-1])


def _repacked_matmul(a, a_scale, packed, w_scale, bias, n, bits, group_size, dtype, **options):
    return _product(a, a_scale, packed, w_scale, dtype, bits <= 4, bias=bias, **options)


def _silu_mul(*args):
    return _repacked_matmul(*args, silu_mul=True)


def _repacked_matmul_add(a, a_scale, packed, w_scale, bias, residual, n, bits, group_size):
    options = {"bias": bias, "residual": residual}
    return _product(a, a_scale, packed, w_scale, residual.dtype, bits <= 4, **options)


def _repacked_linear(x, packed, w_scale, bias, n, bits, group_size):
    return _product(x, None, packed, w_scale, x.dtype, True, bias=bias)


def _repacked_linear_add(x, packed, w_scale, bias, residual, n, bits, group_size):
    return _product(x, None, packed, w_scale, x.dtype, True, bias=bias, residual=residual)


def _quantized_matmul(a, a_scale, w, w_scale, bias, bits, group_size, dtype):
    nibbles = w.dtype == torch.uint8
    codes = unpack_int4(w, a.shape[-1]) if nibbles else w
    packed = linear.layout(codes, nibbles)
    return _product(a, a_scale.flatten(), packed, w_scale, dtype, nibbles, bias=bias)


def _quantized_linear(x, w, w_scale, bias, bits, a_bits):
    if a_bits < 16:
        codes, scale = _quantize(x, a_bits)
        return _quantized_matmul(codes, scale, w, w_scale, bias, bits, -1, x.dtype)
    codes = unpack_int4(w, x.shape[-1]) if w.dtype == torch.uint8 else w
    return _product(x, None, linear.layout(codes, True), w_scale, x.dtype, True, bias=bias)


def _integer_groups(*args):
    return test_int4_linear.multiply(_library("int4_linear"), *args)[0]


def _append_queries(q, k, v, cos, sin, *rest):
    *cache, table, slots, positions, bits, pre_rope = rest
    held = cache_of(cache, k.shape[-1], bits, pre_rope, table)
    kernel = _library("rope_quantize_append")
    rotated, written = append.append(kernel, k, v, cos, sin, held, slots, positions, q)
    return (rotated, q, k, v, cos, sin, *written, *rest[4:])


def _append(k, v, cos, sin, *rest):
    *cache, slots, positions, bits, pre_rope = rest
    tensors, table = cache[:4], cache[4] if len(cache) > 4 else None
    held = cache_of(tensors, k.shape[-1], bits, pre_rope, table)
    kernel = _library("rope_quantize_append")
    written = append.append(kernel, k, v, cos, sin, held, slots, positions)
    return (k, v, cos, sin, *written, *cache[4:], *rest[len(cache) :])


def _attention(*args, **options):
    return test_attention_decode.attend(_library("attention_decode"), list(args), **options)


def _attention_paged(q, *rest):
    cache, table, places, max_length = rest[:4], rest[4], rest[5:9], rest[9]
    return _attention(q, *cache, *places, *rest[10:], table=table, max_length=max_length)


def _attention_quantize(q, *rest):
    cache, table, places, max_length = rest[:4], rest[4], rest[5:9], rest[9]
    options = {"table": table, "max_length": max_length, "quantize_bits": rest[-1]}
    return _attention(q, *cache, *places, *rest[10:-1], **options)


RUN: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "repack_weight": _repack_weight,
    "repacked_matmul": _repacked_matmul,
    "repacked_matmul_silu_mul": _silu_mul,
    "repacked_matmul_add": _repacked_matmul_add,
    "repacked_linear": _repacked_linear,
    "repacked_linear_add": _repacked_linear_add,
    "quantized_matmul": _quantized_matmul,
    "quantized_linear": _quantized_linear,
    "integer_group_matmul": _integer_groups,
    "rope_quantize_append": _append,
    "rope_quantize_append_paged": _append,
    "rope_quantize_append_queries": _append_queries,
    "attention_decode": _attention,
    "attention_decode_paged": _attention_paged,
    "attention_decode_quantize": _attention_quantize,
}


def run(op: str, case: Case) -> Any:
    """What the kernel makes of a case on the CPU, in the form of ``cuda_calls.assert_agrees``."""
    return RUN[op](*case.args)
