"""The bugs: each a small change of a kernel that its tests in the emulator must notice."""

from tests.emulator.planted import cache_bugs, linear_bugs
from tests.emulator.planted.bug import Bug

__all__ = ["BUGS", "Bug"]

BUGS = (*linear_bugs.BUGS, *cache_bugs.BUGS)
