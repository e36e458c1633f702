"""What cells read beside the model, and whether they may be compared: the digests of texts, of the
generator and of the tasks (``inputs`` of a record). Records written before there were any say
nothing, and are taken to agree with all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def counted(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Per role (``text wikitext2``, ``generator``): how many cells read which digest, the most
    frequent first; of equals the one that was read last.
    """
    counts: dict[str, Counter[str]] = {}
    for record in sorted(records, key=lambda record: record.get("finished", ""), reverse=True):
        for role, digest in record.get("inputs", {}).items():
            counts.setdefault(role, Counter())[digest] += 1
    return {role: dict(counter.most_common()) for role, counter in sorted(counts.items())}


def common(records: Iterable[Record]) -> dict[str, str]:
    """Per role the digest that most cells read."""
    return {role: next(iter(by)) for role, by in counted(records).items()}


def others(record: Record, usual: Mapping[str, str]) -> dict[str, str]:
    """What a cell read instead of the usual."""
    inputs = record.get("inputs", {})
    return {role: digest for role, digest in inputs.items() if digest != usual.get(role, digest)}


def agreeing(tables: Sequence[Record]) -> list[Record]:
    """The tables, without any that reads other inputs than one before it."""
    kept: list[Record] = []
    for table in tables:
        if not any(others(table, before["inputs"]) for before in kept):
            kept.append(table)
    return kept
