"""Small calls of every operator that the native library has for CUDA, made on the device.

    python -m tests.kernels.cuda_cases        runs each once (for compute-sanitizer)

Sizes are not multiples of anything, so that every tail of a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import llmqat_kernels as qk
from llmqat_kernels import native, use_backend
from llmqat_kernels.backends.reference import REFERENCE
from llmqat_kernels.schemas import SCHEMAS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Arguments on the device; ``want`` computes the result on the CPU where it is not simply the
    reference's on the same arguments (a weight layout is a backend's own)."""

    args: tuple[Any, ...]
    want: Callable[[], Any] | None = None


def on_cpu(value: Any) -> Any:
    """Tensors copied to the CPU, also those of a tuple."""
    if isinstance(value, tuple | list):
        return tuple(map(on_cpu, value))
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _quantize() -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, columns in ((3, 1000), (5, 7), (1, 9000)):
            yield Case((torch.randn(rows, columns).to(dtype), 8))
        yield Case((torch.randn(2, 3, 96).to(dtype), 4, 32, True))


def _weights(columns: int = 392) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(codes, scale, bits) of weights [70, columns], packed where they can be."""
    for bits in (4, 8):
        codes, scale = qk.quantize(torch.randn(70, columns), bits)
        yield codes, scale, bits
    yield qk.pack_int4(codes.clamp(-7, 7)), scale, 4


def _repack_weight() -> Iterator[Case]:
    for w, _, bits in _weights():
        yield Case((w, bits), lambda: None)  # a layout of its own: the product is what is checked


def _repacked_matmul() -> Iterator[Case]:
    # Cut among blocks of threads, rows of 16-byte multiples; one block, rows that are not.
    for columns in (1328, 392):
        for w, scale, bits in _weights(columns):
            for m in (1, 9, 65):
                a, a_scale = qk.quantize(torch.randn(m, columns), 8)
                bias = torch.randn(70, dtype=torch.bfloat16)
                plain = on_cpu((a, a_scale, w, scale, bias, bits, -1, torch.bfloat16))
                packed = run("repack_weight", Case((w, bits)))
                yield Case(
                    (a, a_scale, packed, scale, bias, 70, bits, -1, torch.bfloat16),
                    lambda plain=plain: REFERENCE["quantized_matmul"](*plain),
                )


def _repacked_linear() -> Iterator[Case]:
    for columns in (1328, 392):
        for w, scale, bits in _weights(columns):
            if bits > 4:
                continue  # refused: the kernel takes nibbles
            for m, dtype in ((1, torch.bfloat16), (9, torch.float16), (65, torch.bfloat16)):
                x, bias = torch.randn(m, columns).to(dtype), torch.randn(70, dtype=dtype)
                # The kernel does not round the weight to x's dtype.
                plain = on_cpu((x.float(), w, scale, bias, bits, 16))
                packed = run("repack_weight", Case((w, bits)))
                yield Case(
                    (x, packed, scale, bias, 70, bits, -1),
                    lambda plain=plain, d=dtype: REFERENCE["quantized_linear"](*plain).to(d),
                )


def _repacked_matmul_silu_mul() -> Iterator[Case]:
    for w, scale, bits in _weights():
        a, a_scale = qk.quantize(torch.randn(9, 392), 8)
        plain = on_cpu((a, a_scale, w, scale, None, 70, bits, -1, torch.bfloat16))
        packed = run("repack_weight", Case((w, bits)))
        yield Case(
            (a, a_scale, packed, scale, None, 70, bits, -1, torch.bfloat16),
            lambda plain=plain: REFERENCE["repacked_matmul_silu_mul"](*plain),
        )


def _quantized_matmul() -> Iterator[Case]:
    for w, scale, bits in _weights():
        a, a_scale = qk.quantize(torch.randn(5, 392), 8)
        yield Case((a, a_scale, w, scale, None, bits, -1, torch.float16))


def _quantized_linear() -> Iterator[Case]:
    for w, scale, bits in _weights():
        yield Case((torch.randn(5, 392, dtype=torch.bfloat16), w, scale, None, bits, 8))


def _integer_group_matmul() -> Iterator[Case]:
    # Both tiles, split and whole, both kinds of groups; then what only the plain kernel takes.
    shapes = ((1, 70, 2112, 64), (8, 64, 1280, 128), (70, 130, 384, 128), (9, 20, 2112, 64))
    for m, n, k, group_size in (*shapes, (3, 5, 45, 15)):
        w, multiplier, scale = qk.quantize_integer_groups(
            torch.randn(n, k), 4, group_size=group_size
        )
        for a_bits in (4, 8):
            a, a_scale = qk.quantize(torch.randn(m, k), a_bits)
            a = qk.pack_int4(a) if a_bits == 4 else a
            rest = multiplier, scale, torch.randn(n), group_size, torch.bfloat16
            yield Case((a, a_scale, qk.pack_int4(w), *rest))


def _cache_calls(head_dim: int) -> Iterator[tuple[Any, tuple[Tensor, ...], Tensor, Tensor]]:
    angles = torch.outer(torch.arange(192).float(), torch.logspace(0, -2, head_dim // 2))
    for mode in ("paper", "serving"):
        for bits in (4, 8):
            device = angles.device
            cache = qk.KVCache.allocate(3, 2, 192, head_dim, bits=bits, mode=mode, device=device)
            codes = cache.k_codes, cache.k_scale, cache.v_codes, cache.v_scale
            yield cache, codes, angles.cos(), angles.sin()


def _rope_quantize_append() -> Iterator[Case]:
    for head_dim in (64, 128):
        for cache, codes, cos, sin in _cache_calls(head_dim):
            k, v = torch.randn(2, 5, 2, head_dim, dtype=torch.bfloat16)
            index = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 191, 77])
            yield Case((k, v, cos, sin, *codes, *index, cache.bits, cache.pre_rope))


def _attention_decode() -> Iterator[Case]:
    for head_dim in (64, 128):
        for cache, codes, cos, sin in _cache_calls(head_dim):
            every = torch.arange(3 * 192)
            k, v = torch.randn(2, 3 * 192, 2, head_dim, dtype=torch.bfloat16)
            place = every // 192, every % 192
            qk.rope_quantize_append(k, v, cos, sin, cache, *place)
            index = torch.tensor([0, 1, 2]), torch.tensor([0, 5, 190])
            q = torch.randn(3, 4, head_dim, dtype=torch.bfloat16)
            yield Case((q, *codes, cos, sin, *index, 0.1, cache.bits, cache.pre_rope))


def _page_calls() -> Iterator[tuple[Any, tuple[Tensor, ...], Tensor, Tensor]]:
    """A cache whose nine slots of 64 tokens, all written, are the pages of three sequences."""
    for head_dim in (64, 128):
        for mode in ("paper", "serving"):
            for bits in (4, 8):
                angles = torch.outer(
                    torch.arange(192).float(), torch.logspace(0, -2, head_dim // 2)
                )
                pool = qk.KVCache.allocate(
                    9, 2, 64, head_dim, bits=bits, mode=mode, device=angles.device
                )
                every = torch.arange(9 * 64)
                k, v = torch.randn(2, 9 * 64, 2, head_dim, dtype=torch.bfloat16)
                qk.rope_quantize_append(
                    k, v, angles[:64].cos(), angles[:64].sin(), pool, every // 64, every % 64
                )
                pools = pool.k_codes, pool.k_scale, pool.v_codes, pool.v_scale
                yield pool, pools, angles.cos(), angles.sin()


def _page_table() -> Tensor:
    return torch.randperm(9).view(3, 3).to(torch.int32)


def _rope_quantize_append_paged() -> Iterator[Case]:
    for pool, pools, cos, sin in _page_calls():
        k, v = torch.randn(2, 5, 2, 2 * cos.shape[1], dtype=torch.bfloat16)
        index = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 191, 77])
        yield Case((k, v, cos, sin, *pools, _page_table(), *index, pool.bits, pool.pre_rope))


def _attention_paged(length: int, *rest: int) -> Iterator[Case]:
    for pool, pools, cos, sin in _page_calls():
        index = torch.tensor([0, 1, 2]), torch.tensor([0, 5, length])
        q = torch.randn(3, 4, 2 * cos.shape[1], dtype=torch.bfloat16)
        places = _page_table(), cos, sin, *index, length
        yield Case((q, *pools, *places, 0.1, pool.bits, pool.pre_rope, *rest))


def _attention_decode_paged() -> Iterator[Case]:
    return _attention_paged(190)


def _attention_decode_quantize() -> Iterator[Case]:
    return _attention_paged(190, 8)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "quantize": _quantize,
    "repack_weight": _repack_weight,
    "repacked_matmul": _repacked_matmul,
    "repacked_matmul_silu_mul": _repacked_matmul_silu_mul,
    "repacked_linear": _repacked_linear,
    "quantized_matmul": _quantized_matmul,
    "quantized_linear": _quantized_linear,
    "integer_group_matmul": _integer_group_matmul,
    "rope_quantize_append": _rope_quantize_append,
    "attention_decode": _attention_decode,
    "rope_quantize_append_paged": _rope_quantize_append_paged,
    "attention_decode_paged": _attention_decode_paged,
    "attention_decode_quantize": _attention_decode_quantize,
}


def operators() -> list[str]:
    """The operators of ``SCHEMAS`` that the library has for CUDA; empty if there is no library."""
    if not native.is_available():
        return []
    return [op for op in SCHEMAS if hasattr(torch.ops.llmqat_cuda, op)]


def cases(op: str, device: str = "cuda") -> list[Case]:
    """The calls of one operator, made from a fixed seed by the reference backend."""
    torch.manual_seed(0)
    with torch.no_grad(), torch.device(device), use_backend("reference"):
        return list(CASES[op]())


def run(op: str, case: Case) -> Any:
    """The result of the native CUDA kernel."""
    with torch.no_grad():
        return getattr(torch.ops.llmqat_cuda, op)(*case.args)


def expected(op: str, case: Case) -> Any:
    """What the reference makes of the same arguments, on the CPU; it changes what it may change
    in its own copies, which come back with the result."""
    if case.want is not None:
        return case.want()
    args = on_cpu(case.args)
    result = REFERENCE[op](*args)
    return args if result is None else result


def main() -> None:
    """Run everything once; an error of a kernel ends the process."""
    count = 0
    for op in operators():
        for case in cases(op):
            run(op, case)
            torch.cuda.synchronize()
            count += 1
    print(f"{count} calls of {len(operators())} operators")


if __name__ == "__main__":
    main()
