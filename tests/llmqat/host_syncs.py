"""A guard that fails where the host would wait for a device: a value read, or a shape that depends
on values. It sees the calls on CPU tensors, where they cost nothing and nothing else shows them.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    f"{name}"
    for name in (
        "tolist item numpy cpu __bool__ __int__ __float__ __index__ __array__ __contains__"
        " is_nonzero"
    ).split()
}
"""Methods of Tensor that give numbers to Python."""
VALUE_DEPENDENT = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}


class HostSync(AssertionError):
    """The code under test waited for a value."""


class _Methods(TorchFunctionMode):
    def __init__(self, guard):
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if self.guard.watching and name in READS:
            raise HostSync(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, guard):
        super().__init__()
        self.guard = guard

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.guard.watching:
            name = op.name()
            if name in VALUE_DEPENDENT or _indexes_by_mask(name, args):
                raise HostSync(name)
            self.guard.seen.append(op)
        return op(*args, **(kwargs or {}))


def _indexes_by_mask(name, args):
    if not name.startswith(("aten::index.", "aten::index_put")):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class Guard:
    """What :func:`no_host_syncs` gives: operators seen, and a pause for code that runs elsewhere on
    a device (the interpreter of its kernels).
    """

    def __init__(self):
        self.watching, self.seen = True, []

    @contextmanager
    def paused(self):
        """Within it nothing is watched."""
        before, self.watching = self.watching, False
        try:
            yield
        finally:
            self.watching = before


@contextmanager
def no_host_syncs():
    """Within it, waiting for a value raises :class:`HostSync`."""
    guard = Guard()
    with _Methods(guard), _Operators(guard):
        yield guard
