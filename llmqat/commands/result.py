"""The last word of a command with ``--json``: one JSON object on a line of its own."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["last_json"]


def last_json(text: str) -> Any:
    """The last JSON object printed in ``text``, or None of a command that prints prose."""
    for line in reversed(text.strip().splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None
