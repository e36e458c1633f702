"""Guard bands: bytes around tensors that no kernel may write, and that turn a result NaN if read.

Triton checks no bounds, neither compiled nor interpreted. Usage::

    x = poisoned(x)                      # NaN before and after x's elements
    with guard_bands():                  # outputs and workspaces lie between bands too
        got = run("quantize", x, 8)      # AssertionError on exit if a band was written
    assert_same_bits(got[0], want)       # an element never written holds the poison

The poison is NaN in every float dtype, -43 or -1 in int8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from llmqat_kernels.backends.triton import kernels, launch

from .device import DEVICE

BAND = 4096
"""Bytes on each side; a multiple of 16, so that the tensor between them stays aligned."""
POISON = 0xFFD5 - 0x10000
"""As int16: a NaN of fp16 and bf16, twice a NaN of fp32."""


def _surrounded(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A poisoned tensor and the bytes of its buffer, bands included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    words = torch.full((BAND + (size + 1) // 2,), POISON, dtype=torch.int16, device=device)
    buffer = words.view(torch.uint8)
    return buffer[BAND : BAND + size].view(dtype).view(shape), buffer[: 2 * BAND + size]


def poisoned(x: Tensor, offset: int = 0) -> Tensor:
    """The values of ``x``, contiguous on the tests' device, between bands of NaN.

    ``offset`` elements of poison before the first one break its 16-byte alignment.
    """
    flat, _ = _surrounded((x.numel() + offset,), x.dtype, DEVICE)
    inside = flat[offset:].view(x.shape)
    return inside.copy_(x)


@contextmanager
def guard_bands() -> Iterator[None]:
    """Surround everything ``launch.empty`` allocates; fails if a band was written meanwhile, or if
    nothing was allocated.
    """
    buffers: list[Tensor] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        inside, buffer = _surrounded(shape, dtype, device)
        buffers.append(buffer)
        return inside

    kernels()  # every file of kernels is imported now, so that no name escapes the patch
    original = launch.empty
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("llmqat_kernels.backends.triton")
        and getattr(module, "empty", None) is original
    ]
    patches = [mock.patch.object(module, "empty", empty) for module in users]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
    if not buffers:
        raise AssertionError("no kernel allocated through launch.empty: nothing was guarded")
    for index, buffer in enumerate(buffers):
        clean = torch.full((BAND,), POISON, dtype=torch.int16, device=buffer.device)
        clean = clean.view(torch.uint8)
        size = buffer.numel() - 2 * BAND
        if not torch.equal(buffer[:BAND], clean[:BAND]):
            raise AssertionError(f"allocation {index} ({size} bytes): bytes before it were written")
        if not torch.equal(buffer[BAND + size :], clean[size % 2 : size % 2 + BAND]):
            raise AssertionError(f"allocation {index} ({size} bytes): bytes after it were written")
