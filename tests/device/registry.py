"""The flows: what users do on a GPU, as functions of the place where it is done.

`tests/twin` runs all of them in every commit, `test_device.py` on a CUDA device (`make test-gpu`);
so no line of them is run by a GPU alone.
"""

from __future__ import annotations

from functools import partial

FLOWS = {}
"""Name -> function of a place (`place.py`)."""


def flow(case="", **options):
    """Add ``function(place, **options)`` as a flow; with a case, one of several of its name."""

    def add(function):
        name = f"{function.__name__}[{case}]" if case else function.__name__
        assert name not in FLOWS, name
        FLOWS[name] = partial(function, **options)
        return function

    return add
