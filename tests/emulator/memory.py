"""Tensors that kernels may touch and nothing beside them."""

import ctypes
import mmap
import weakref
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

CANARY = 0xC5
POISON = 0xFF  # NaN in every float format, -1 in every code
MARGIN = 256  # bytes of canary before a tensor, at least
ALIGN = 16  # of a tensor's address, as of torch's own

_GUARDED: weakref.WeakKeyDictionary[mmap.mmap, tuple[int, int]] = weakref.WeakKeyDictionary()
"""The pages of every guarded tensor that is alive: address and bytes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class Guarded:
    """A tensor between canary bytes, in front of a page that faults on any access.

    The emulator turns the fault into an :class:`~tests.emulator.build.EmulatorError`; what lies in
    the up to 15 bytes that the alignment leaves is seen by :meth:`check` if it is written.
    """

    tensor: Tensor
    before: Tensor
    after: Tensor

    def check(self) -> Tensor:
        """The tensor, once the bytes around it are seen to be untouched."""
        for name, band in (("before", self.before), ("after", self.after)):
            assert (band == CANARY).all(), f"the kernel wrote {name} the tensor"
        return self.tensor

    @property
    def pointer(self) -> int:
        return self.tensor.data_ptr()


def guarded_pages() -> list[tuple[int, int]]:
    """Address and bytes of the pages of every guarded tensor that is alive."""
    return list(_GUARDED.values())


def guard(tensor: Tensor) -> Guarded:
    """A contiguous copy of ``tensor`` on guarded pages."""
    result = poisoned(tensor.shape, tensor.dtype)
    result.tensor.copy_(tensor)
    return result


def poisoned(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Guarded:
    """A tensor of ``POISON`` bytes on guarded pages: what an output is before a kernel runs."""
    size = prod(shape) * dtype.itemsize
    page = mmap.PAGESIZE
    pages = -(-(size + ALIGN + MARGIN) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    end = pages * page
    if _libc.mprotect(everything.data_ptr() + end, page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    _GUARDED[memory] = (everything.data_ptr(), end)
    start = (end - size) // ALIGN * ALIGN
    everything[:start].fill_(CANARY)
    everything[start : start + size].fill_(POISON)
    everything[start + size : end].fill_(CANARY)
    inner = everything[start : start + size]
    tensor = inner.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    return Guarded(tensor, everything[:start], everything[start + size : end])
