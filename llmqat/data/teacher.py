"""Which teacher wrote: records and logits of different ones must not be mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmqat import io

__all__ = ["teacher_digest"]


def teacher_digest(directory: str) -> str:
    """SHA-256 over a model folder's config and weights."""
    total = hashlib.sha256()
    folder = Path(directory)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        total.update(f"{path.name} {io.sha256_file(path)}\n".encode())
    return total.hexdigest()
