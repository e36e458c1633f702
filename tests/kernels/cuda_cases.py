"""Calls of every operator that the native library has for CUDA, made on the device.

    python -m tests.kernels.cuda_cases        runs the small ones once (for compute-sanitizer)

The arguments are made on the CPU by the reference backend, so that nothing but our kernels runs on
the device; ``test_cuda_cases.py`` runs the same calls in the emulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from llmqat_kernels import native, use_backend
from llmqat_kernels.schemas import SCHEMAS
from tests.kernels import cuda_kv_calls as kv
from tests.kernels import cuda_linear_calls as linear
from tests.kernels.cuda_calls import Case

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "quantize": linear.quantize,
    "repack_weight": linear.repack_weight,
    "repacked_matmul": linear.repacked_matmul,
    "repacked_matmul_silu_mul": linear.repacked_matmul_silu_mul,
    "repacked_matmul_add": linear.repacked_matmul_add,
    "repacked_linear": linear.repacked_linear,
    "repacked_linear_add": linear.repacked_linear_add,
    "quantized_matmul": linear.quantized_matmul,
    "quantized_linear": linear.quantized_linear,
    "integer_group_matmul": linear.integer_group_matmul,
    "rope_quantize_append": kv.rope_quantize_append,
    "attention_decode": kv.attention_decode,
    "rope_quantize_append_paged": kv.rope_quantize_append_paged,
    "rope_quantize_append_queries": kv.rope_quantize_append_queries,
    "attention_decode_paged": kv.attention_decode_paged,
    "attention_decode_quantize": kv.attention_decode_quantize,
}


def operators() -> list[str]:
    """The operators of ``SCHEMAS`` that the library has for CUDA; empty if there is no library."""
    if not native.is_available():
        return []
    return [op for op in SCHEMAS if hasattr(torch.ops.llmqat_cuda, op)]


def cases(op: str, device: str = "cuda", *, small: bool = False) -> list[Case]:
    """The calls of one operator, made from a fixed seed; with ``small`` those of compute-sanitizer
    alone."""
    torch.manual_seed(0)
    with torch.no_grad(), use_backend("reference"):
        made = [case for case in CASES[op]() if case.small or not small]
    return made if device == "cpu" else [case.on(device) for case in made]


def run(op: str, case: Case) -> Any:
    """The result of the native CUDA kernel."""
    with torch.no_grad():
        return getattr(torch.ops.llmqat_cuda, op)(*case.args)


def main() -> None:
    """Run the small ones once; an error of a kernel ends the process."""
    count = 0
    for op in operators():
        for case in cases(op, small=True):
            run(op, case)
            torch.cuda.synchronize()
            count += 1
    print(f"{count} calls of {len(operators())} operators")


if __name__ == "__main__":
    main()
