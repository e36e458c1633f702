"""CUDA graphs of the twin device: what runs while one is captured is recorded and undone; a replay
runs it again on the same memory. Like a graph, it knows nothing that Python decided.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves


class Tape:
    """The calls of the capture under way, on CPU tensors."""

    def __init__(self):
        self.recording = False
        self.replays = 0
        self._calls, self._memory = [], {}

    def run(self, function, args, kwargs):
        """``function(*args, **kwargs)``, recorded while a capture is under way."""
        if not self.recording:
            return function(*args, **kwargs)
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            self._memory.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        self._calls.append((function, args, kwargs, result))
        return result

    def begin(self):
        """From here on, calls are recorded."""
        self.recording, self._calls, self._memory = True, [], {}

    def end(self):
        """The recorded calls; memory holds what it held before: a capture computes nothing."""
        self.recording = False
        for storage, before in self._memory.values():
            storage.copy_(before)
        self._memory = {}
        return self._calls

    def replay(self, calls):
        """Run recorded calls again; results go where the recorded ones are."""
        self.replays += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode():
            for function, args, kwargs, result in calls:
                again = function(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


TAPE = Tape()


class CUDAGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls = []

    def pool(self):
        """A handle of its memory."""
        return (0, 1)

    def replay(self):
        """Run what was captured."""
        TAPE.replay(self.calls)


class graph:
    """Stands for torch.cuda.graph."""

    def __init__(self, captured, pool=None, stream=None, capture_error_mode="global"):
        self._graph = captured

    def __enter__(self):
        TAPE.begin()

    def __exit__(self, *error):
        self._graph.calls = TAPE.end()
