"""Repairs of Triton's interpreter, so that it computes what the compiled kernels compute.

Triton's interpreter (3.6 to 3.9) holds bf16 as raw 16-bit integers and computes on them as such,
truncates casts to bf16, and before 3.9 knows no bf16 constants and cannot loop to a run-time bound
under numpy >= 2.4. Without these repairs a kernel would return wrong numbers silently, so
``TRITON_INTERPRET=1`` applies them before the first kernel is imported.
Tests: tests/triton/test_interpreter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def _is_bf16(value: Any) -> bool:
    return (
        isinstance(value, Handle)
        and value.dtype.scalar == tl.bfloat16
        and value.data.dtype == np.uint16
    )


def _widened(value: Any) -> Any:
    """A bf16 handle as fp32, exactly; anything else unchanged."""
    if not _is_bf16(value):
        return value
    return Handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(data: np.ndarray[Any, Any]) -> Any:
    """fp32 data as a bf16 handle, rounded to nearest even."""
    wide = np.ascontiguousarray(data, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(wide), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder method that widens bf16 operands and rounds a float result back."""

    @wraps(method)
    def run(self: Any, *operands: Any) -> Any:
        if not any(map(_is_bf16, operands)):
            return method(self, *operands)
        result = method(self, *map(_widened, operands))
        return _narrowed(result.data) if result.data.dtype == np.float32 else result

    return run


def _repair_casts() -> None:
    cast, fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return _narrowed(source.data.astype(np.float32))
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            wide = _widened(source)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        towards_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32 and not towards_zero:
            return _narrowed(source.data)
        return fp_to_fp(self, source, target, rounding)

    def get_bf16(self: Any, value: float) -> Any:
        return _narrowed(np.array([value], dtype=np.float32))

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.get_bf16 = get_bf16


def _rounded_once(x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` of fp32 arrays with one rounding: in fp64 rounded to odd, then to fp32."""
    with np.errstate(all="ignore"):
        product, term = x.astype(np.float64) * y, z.astype(np.float64)  # the product is exact
        total = product + term
        back = total - product
        lost = (product - (total - back)) + (term - back)  # exact where all is finite
        bits = np.ascontiguousarray(total).view(np.int64)
        # An even total that lost something moves to the odd neighbour on the other side of it.
        move = np.where((lost > 0) == (total > 0), 1, -1)
        inexact = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
        return np.where(inexact, (bits + move * inexact).view(np.float64), total).astype(np.float32)


def _repair_fma() -> None:
    """Triton's interpreter multiplies, rounds, and adds."""
    fma = Builder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return fma(self, x, y, z)
        return Handle(_rounded_once(x.data, y.data, z.data), z.dtype.scalar)

    Builder.create_fma = create_fma


def _repair_arithmetic() -> None:
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(Builder, name, _in_fp32(getattr(Builder, name)))
    dot = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), accumulator, *rest)

    Builder.create_dot = create_dot


def _repair_reductions() -> None:
    def of_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
            value = source[0] if isinstance(source, tuple) else source
            if not _is_bf16(value.handle):
                return method(self, source, *args, **kwargs)
            wide = tl.core.tensor(_widened(value.handle), _with_element(value.type, tl.float32))
            result = method(self, wide, *args, **kwargs)
            back = [_to_bf16(item) for item in (result if isinstance(result, tuple) else (result,))]
            return tuple(back) if isinstance(result, tuple) else back[0]

        return run

    reductions = interpreter.ReduceOps
    reductions.sum, reductions.min_max = of_fp32(reductions.sum), of_fp32(reductions.min_max)


def _with_element(kind: Any, element: Any) -> Any:
    return kind.with_element_ty(element) if kind.is_block() else element


def _to_bf16(value: Any) -> Any:
    if value.handle.dtype.scalar != tl.float32:
        return value
    return tl.core.tensor(_narrowed(value.handle.data), _with_element(value.type, tl.bfloat16))


def _repair_loop_bounds() -> None:
    """``range(0, n)`` to a run-time n: numpy 2.4 does not take an array of one element as int."""
    patch = interpreter._patch_lang_tensor

    def index(value: Any) -> int:
        return int(np.asarray(value.handle.data).item())

    def patched(tensor: Any, *rest: Any) -> Any:
        result = patch(tensor, *rest)
        if rest:
            rest[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    interpreter._patch_lang_tensor = patched


def _repair_masks() -> None:
    """Triton 3.9 turns the "and" of a block of booleans and a scalar one into integers, and then
    refuses them as a mask.
    """
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def booleans(mask: Any) -> Any:
        return Handle(mask.data.astype(np.bool_), mask.dtype)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, booleans(mask), *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, booleans(mask), *rest)

    Builder.create_masked_load = create_masked_load
    Builder.create_masked_store = create_masked_store


def _patch_the_language_once() -> None:
    """Not a repair but 40 % of the time: every call of a device function inside a kernel patches
    the language again. The launch has patched it for the kernels' modules; what Triton's own
    modules see stays patched after their first call.
    """
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@cache
def repair() -> None:
    """Apply every repair, once."""
    _repair_casts()
    _repair_fma()
    _repair_arithmetic()
    _repair_reductions()
    _repair_loop_bounds()
    _repair_masks()
    _patch_the_language_once()
