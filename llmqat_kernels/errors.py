"""Typed errors of the kernel package: every message is one line that names the argument and the
fix.
"""

from __future__ import annotations


class InvalidArgument(ValueError):
    """A value that no backend can compute with: wrong bits, mismatched shapes, out-of-range
    indices.
    """


class InvalidArgumentType(TypeError):
    """An argument of the wrong Python type or tensor dtype."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this operator here; the message says why."""
