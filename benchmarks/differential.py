"""Random cases of every exact operator: the Triton or CUDA backend against the specification.

A case is an operator with the small arguments of benchmarks/random_arguments.py. Some cases also
compare rows of a batch with the same rows alone, and a second run with the first: both must have
the same bits. Used by `python -m benchmarks.equality --backend triton` (or `cuda`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmqat_kernels as qk
from benchmarks.random_arguments import DRAWS, Args, Draw
from llmqat_kernels import dispatch
from llmqat_kernels.backends.composite import COMPOSITES
from llmqat_kernels.backends.reference import REFERENCE
from llmqat_kernels.errors import BackendUnavailable

ops = torch.ops.llmqat
BATCH_EVERY = 10
"""One case in so many also checks batch invariance and repeatability."""


BATCHED = {
    "quantize": (0,),
    "fake_quantize": (0,),
    "quantized_matmul": (0, 1),
    "repacked_matmul": (0, 1),
    "repacked_matmul_silu_mul": (0, 1),
    "repacked_matmul_add": (0, 1, 5),
    "quantized_linear": (0,),
    "qat_linear": (0,),
    "integer_group_matmul": (0, 1),
    "rms_norm_quantize": (0, 4),
    "silu_mul_quantize": (0, 1),
    "rope": (0, 3),
    "sample": (0, 1, 2, 3),
}
"""Operator -> its arguments that have a row for each row of the batch."""


WIDTH_OF_LAYOUT = {"repacked_matmul": 6, "repacked_matmul_silu_mul": 6, "repacked_matmul_add": 7}
"""Operators whose argument 2 is a weight of ``repack_weight`` -> which argument is its width."""


CACHES = slice(4, 8)
"""Arguments of rope_quantize_append that are its results."""


NAMES = {"triton": "Triton", "cuda": "CUDA"}
REFUSAL = "use backend"
"""Part of the message of a kernel that does not take a case and names the backend that does."""


def _reaches(backend: str, op: str) -> bool:
    """Whether a kernel of the backend runs, itself or in what the operator is composed of."""
    if dispatch._own_kernel(backend, op)[0] is not None:
        return True
    if any(dispatch._own_kernel(other, op)[0] for other in dispatch.BESIDE.get(backend, ())):
        return False
    parts = getattr(COMPOSITES.get(op), "keywords", {})
    return any(_reaches(backend, part) for part in parts)


def tested_ops(backend: str = "triton") -> tuple[list[str], dict[str, str]]:
    """The operators that have a kernel of this backend, or are composed of such; and why others are
    not compared.
    """
    tested, left_out = [], {}
    for op in DRAWS:
        if _reaches(backend, op):
            tested.append(op)
        elif COMPOSITES.get(op) is REFERENCE[op]:
            left_out[op] = "the reference's own function"
        else:
            left_out[op] = f"no {NAMES[backend]} kernel"
    return tested, left_out


def signature(op: str, args: Args) -> tuple[Any, ...]:
    """What makes a case another shape: sizes, dtypes and settings, not values."""
    parts = (
        (tuple(a.shape), a.dtype, a.stride()) if isinstance(a, Tensor) else a
        for a in args
        if not isinstance(a, float)
    )
    return op, *(part if not isinstance(part, int) or part < 2**31 else "seed" for part in parts)


def call(op: str, args: Args, device: torch.device | None) -> tuple[Tensor, ...]:
    """Results on the CPU: of the specification (device None), or of the backend in use."""
    if device is None:
        function: Callable[..., Any] = REFERENCE[op]
    else:
        function = getattr(ops, op)
    moved = [a.to(device) if device is not None and isinstance(a, Tensor) else a for a in args]
    if op == "rope_quantize_append":  # the caches are written in place
        moved[CACHES] = [tensor.clone() for tensor in moved[CACHES]]
    if op in WIDTH_OF_LAYOUT and device is not None:
        moved[2] = ops.repack_weight(moved[2], args[WIDTH_OF_LAYOUT[op]])
    with torch.no_grad():
        result = function(*moved)
    if op == "rope_quantize_append":
        result = tuple(moved[CACHES])
    results = result if isinstance(result, tuple) else (result,)
    return tuple(tensor.cpu() for tensor in results)


def differences(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> int:
    """Elements that differ (NaN equals NaN); a wrong shape or dtype counts as one."""
    wrong = 0 if len(actual) == len(expected) else 1
    for ours, theirs in zip(actual, expected, strict=False):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            wrong += 1
            continue
        same = ours == theirs
        if ours.is_floating_point():
            same |= ours.isnan() & theirs.isnan()
        wrong += int((~same).sum())
    return wrong


def check_batch(op: str, args: Args, full: tuple[Tensor, ...], device: torch.device) -> int:
    """Differences between rows of the batch and the same rows alone, and of a second run."""
    wrong = differences(call(op, args, device), full)
    rows = args[BATCHED[op][0]].shape[0]
    part = slice(rows // 2, rows // 2 + 1)
    alone = tuple(
        a[part] if index in BATCHED[op] and isinstance(a, Tensor) else a
        for index, a in enumerate(args)
    )
    expected = tuple(t[part] if t.shape[:1] == (rows,) else t for t in full)
    return wrong + differences(call(op, alone, device), expected)


def run(
    cases: int,
    device: torch.device,
    seed: int = 0,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    backend: str = "triton",
) -> dict[str, Any]:
    """Compare ``cases`` cases, the operators in turn, and stop after ``seconds`` by ``clock``.

    Returns counts: cases, distinct shapes, elements, differences, cases by operator, batch checks,
    cases a minute, cases that the backend refused, and the first failures as text.
    """
    tested, left_out = tested_ops(backend)
    refused: Counter[str] = Counter()
    by_op: Counter[str] = Counter()
    shapes: set[Any] = set()
    failures: list[str] = []
    wrong = elements = batches = 0
    begin = clock()
    # The interpreter computes NaN rows in numpy, which would warn of each.
    with qk.use_backend(backend), np.errstate(all="ignore"):
        for index in range(cases):
            if seconds is not None and clock() - begin > seconds:
                break
            op = tested[index % len(tested)]
            draw_seed = seed + index
            args = DRAWS[op](Draw(draw_seed, wide=device.type == "cpu"))
            try:
                actual = call(op, args, device)
            except RuntimeError as error:
                if not isinstance(error, BackendUnavailable) and REFUSAL not in str(error):
                    raise
                refused[op] += 1
                continue
            found = differences(actual, call(op, args, None))
            if op in BATCHED and index // len(tested) % BATCH_EVERY == 0:
                found += check_batch(op, args, actual, device)
                batches += 1
            if found and len(failures) < 20:
                failures.append(f"{op}, seed {draw_seed}: {found} differ")
            by_op[op] += 1
            shapes.add(signature(op, args))
            wrong += found
            elements += sum(tensor.numel() for tensor in actual)
    minutes = (clock() - begin) / 60
    done = sum(by_op.values())
    return {
        "cases": done,
        "shapes": len(shapes),
        "elements": elements,
        "differences": wrong,
        "batch_checks": batches,
        "cases_per_minute": round(done / minutes, 1) if minutes else 0.0,
        "by_operator": dict(sorted(by_op.items())),
        "refused": dict(sorted(refused.items())),
        "left_out": left_out,
        "failures": failures,
    }
