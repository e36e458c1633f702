"""One planted bug."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """``text``, which ``file`` holds exactly once, becomes ``replacement``.

    ``tests`` are the short check that must fail then: a file of ``tests/emulator`` and what to
    select in it (pytest's -k).
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, str]
