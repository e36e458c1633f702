"""What a device would be given, call by call: the twin's record of kernels.

Triton kernels and torch's operators are seen as they are called. In the place of a CUDA C++
operator the reference runs; what its binding and its launcher would do is in two tables here, and
``tests/emulator/test_launches.py`` holds the launchers to theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

LAUNCHES = {
    "attention_decode": 2,
    "attention_decode_paged": 2,
    "attention_decode_quantize": 2,
}
"""Of one call with at most 64 rows; one where nothing is said."""
STRIDED = {
    "quantize": 1,
    "rope_quantize_append": 2,
    "rope_quantize_append_paged": 2,
    "rope_quantize_append_queries": 3,
    "attention_decode": 1,
    "attention_decode_paged": 1,
    "attention_decode_quantize": 1,
}
"""How many arguments, from the first on, may be views whose last dimension is dense; the bindings
copy every other operand that is not contiguous."""
NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift_fresh")

LAUNCHED: list[str] = []
"""Names since it was cleared, in order."""


def native(op: str, args: tuple[Any, ...]) -> Iterator[str]:
    """The launches of a CUDA C++ operator, copies of its operands first."""
    for place, x in enumerate(args):
        if not isinstance(x, torch.Tensor) or x.is_contiguous():
            continue
        if place >= STRIDED.get(op, 0) or x.stride(-1) != 1:
            yield f"copy of argument {place} of {op}"
    yield from [op] * LAUNCHES.get(op, 1)


def torch_operator(op: torch._ops.OpOverload) -> Iterator[str]:
    """The launch of an operator of torch, if it is one."""
    if not op.is_view and not op.name().startswith(NO_KERNEL):
        yield op.name()
