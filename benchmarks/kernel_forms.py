"""The forms of the Triton kernels that launches can select: ``variants()`` of their files."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from benchmarks.gates import APPROXIMATE
from llmqat_kernels.backends import triton as backend
from llmqat_kernels.backends.triton.launch import Variant

FLOAT_SUMS = frozenset({"attention_decode", "distillation_loss"})
"""Files whose results are sums of exponentials, exact up to the 2x rule of the specification."""

Form = tuple[str, str, int]
"""File, name of the variant, architecture."""


def modules() -> list[str]:
    """The files of kernels that exist."""
    return [name for name in backend.MODULES if find_spec(f"{backend.__name__}.{name}")]


def kernels_of(module: str) -> ModuleType:
    """The imported file of kernels."""
    return importlib.import_module(f"{backend.__name__}.{module}")


@cache
def variants(module: str, arch: int) -> dict[str, Variant]:
    """The variants of a file by name.

    Raises:
        ValueError: two variants of one name.
    """
    found: dict[str, Variant] = {}
    for variant in kernels_of(module).variants(arch):
        if variant.name in found:
            raise ValueError(f"{module}: two variants are called {variant.name!r}")
        found[variant.name] = variant
    return found


def promises(module: str, variant: Variant) -> tuple[str, ...]:
    """What the compiled form must show, in alphabetical order."""
    return tuple(sorted(variant.promises | ({APPROXIMATE} if module in FLOAT_SUMS else set())))


def _firsts(module: str, arch: int) -> list[str]:
    """The first variant of each kernel function."""
    first: dict[str, str] = {}
    for name, variant in variants(module, arch).items():
        first.setdefault(variant.kernel.__name__, name)
    return list(first.values())


def names(module: str, arch: int, quick: bool) -> list[str]:
    """The variants of a file; of one that cannot be imported a name that no variant has."""
    try:
        return _firsts(module, arch) if quick else list(variants(module, arch))
    except Exception as error:  # one broken file must not hide the others
        return [f"variants(): {type(error).__name__}"]


def selected(
    only: Sequence[str], archs: Sequence[int], quick: bool = False, skip: Sequence[str] = ()
) -> list[Form]:
    """Everything that the options ask for: a text of ``only`` and none of ``skip`` in file/name."""
    return [
        (module, name, arch)
        for module in modules()
        for arch in archs
        for name in names(module, arch, quick)
        if not only or any(text in f"{module}/{name}" for text in only)
        if not any(text in f"{module}/{name}" for text in skip)
    ]


def drawn(forms: Sequence[Form], count: int, seed: str) -> list[Form]:
    """About ``count`` random forms, as many of each file and architecture as of any other."""
    groups: dict[tuple[str, int], list[Form]] = {}
    for form in forms:
        groups.setdefault((form[0], form[2]), []).append(form)
    draw = random.Random(seed)
    each = -(-count // max(len(groups), 1))
    return [form for group in groups.values() for form in draw.sample(group, min(each, len(group)))]
