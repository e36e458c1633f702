"""CUDA graphs on the CPU: the operators of a body are recorded with the tensors they ran on, and a
replay runs them again on those tensors. Like a graph, it knows nothing that Python decided.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.inside = [], False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not (self.inside or op.is_view):
            self.calls.append((op, args, kwargs or {}, result))
        return result

    def launch(self, function, args, kwargs):
        """Record `function`, which writes into its arguments, as one call."""
        self.calls.append((function, args, kwargs, None))
        self.inside = True
        try:
            function(*args, **kwargs)
        finally:
            self.inside = False


class RecordedGraphs:
    """A `Capture` of llmqat.runtime.graphs; `captures` counts its graphs."""

    def __init__(self):
        self.captures = 0
        self._recorder = None

    def recorded(self, function):
        """`function`, a launch of a kernel that torch does not see, as a part of graphs."""

        def run(*args, **kwargs):
            if self._recorder is None:
                function(*args, **kwargs)
            else:
                self._recorder.launch(function, args, kwargs)

        return run

    def __call__(self, body, undo):
        self.captures += 1
        body()  # the warm-up
        undo()
        with _Recorder() as recorder:  # a capture runs nothing, so this is undone as well
            self._recorder = recorder
            result = body()
            self._recorder = None
        undo()
        storages = _storages(recorder.calls)

        def replay():
            for op, args, kwargs, old in recorder.calls:
                _copy(old, op(*args, **kwargs))
            assert storages == _storages(recorder.calls)

        return replay, result


def _copy(old, new):
    for before, after in zip(tree_leaves(old), tree_leaves(new), strict=True):
        if isinstance(before, torch.Tensor) and before.data_ptr() != after.data_ptr():
            before.copy_(after)


def _storages(calls):
    leaves = tree_leaves([call[1:] for call in calls])
    return [leaf.data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor)]
