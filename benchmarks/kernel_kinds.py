"""Which forms of the Triton kernels are of one kind, so that compiling one of them proves them all.

A launch's form has the types of its arguments, what is promised of them (launch.multiples), the
constants and the options. Row lengths, head dimensions, group sizes and bit widths are without end;
so two forms are of one kind if they differ only in

* ``QMAX``, a factor (0 is a kind of its own: not quantized), and ``BF16_SCALE``, a rounding a row;
* the bias of a matmul, a vector that is added at the end;
* the weight of a norm without a sum, which holds less than the one with a sum;
* the number of steps of a loop (``STEPS``), if it is more than one;
* how rows of 1024 elements a program are cut (``ROWS`` x ``WIDTH``);
* ``HALF`` and ``D`` within a tile: full or partly masked, and with two codes a byte even or odd;

and if no size of it is larger than that of a form that is compiled: chunks of a row, elements a
lane, width of a head's tile, spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cubin import multiples_of_16
from llmqat_kernels.backends.triton.launch import Variant

MAY_BE_WITHOUT = ("HAS_RESIDUAL", "HAS_TOTAL")
SIZES = ("CHUNKS", "SPANS", "HALF_BLOCK", "D_BLOCK")


@dataclass(frozen=True)
class Kind:
    """What must be equal, and sizes of which the largest counts."""

    kernel: str
    what: tuple[Any, ...]
    sizes: tuple[int, ...]

    def covers(self, other: Kind) -> bool:
        """Whether a form of this kind proves one of the ``other``."""
        same = (self.kernel, self.what) == (other.kernel, other.what)
        return same and all(a >= b for a, b in zip(self.sizes, other.sizes, strict=True))


def _part(length: int, block: int, packed: bool) -> str:
    if length == block:
        return "full"
    return ("odd" if length % 2 else "even") if packed else "part"


def kind_of(variant: Variant) -> Kind:
    """The kind of a form."""
    constants, types = dict(variant.constants), dict(variant.signature)
    sizes = {name: constants.pop(name) for name in SIZES if name in constants}
    warps = variant.num_warps
    lanes = 32 * warps
    for name in ("bias", "BF16_SCALE"):
        constants.pop(name, None)
        types.pop(name, None)
    for name in MAY_BE_WITHOUT:
        if constants.get(name) is False:
            types.pop("weight", None)
    if "QMAX" in constants:
        constants["QMAX"] = constants["QMAX"] > 0
    if "STEPS" in constants and "WHOLE" in constants:
        constants["STEPS"] = constants["STEPS"] > 1
    if "HALF" in constants:
        packed = bool(constants.get("PACKED"))
        constants["HALF"] = _part(constants["HALF"], sizes["HALF_BLOCK"], packed)
    if "D" in constants:
        whole = constants["D"] % 16 == 0
        constants["D"] = (_part(constants["D"], sizes["D_BLOCK"], False), whole)
    if "ROWS" in constants:
        constants["elements"] = constants.pop("ROWS") * constants.pop("WIDTH")
    elif "WIDTH" in constants:
        sizes["a lane"], warps = constants.pop("WIDTH") // lanes, 0
    elif "HEADS" in constants:
        elements = 2 * constants.pop("HEADS") * sizes.pop("HALF_BLOCK")
        sizes["a lane"], warps = elements // lanes, 0
    elif "CHUNK" in constants:
        elements = constants.pop("CHUNK") * constants.pop("BLOCK")
        sizes["a lane"], warps = elements // lanes, 0
    promised = [name for name in multiples_of_16(variant) if name in types]
    what = (
        tuple(sorted(types.items())),
        tuple(promised),
        tuple(sorted((name, repr(value)) for name, value in constants.items())),
        warps,
        variant.num_stages,
    )
    return Kind(variant.kernel.__name__, what, tuple(sizes[name] for name in sorted(sizes)))


def uncovered(launched: Iterable[Variant], listed: Sequence[Variant]) -> list[Variant]:
    """The launched forms that no listed form proves."""
    by_what: dict[tuple[Any, ...], list[Kind]] = {}
    for variant in listed:
        kind = kind_of(variant)
        by_what.setdefault((kind.kernel, kind.what), []).append(kind)
    found = []
    for variant in launched:
        kind = kind_of(variant)
        proofs = by_what.get((kind.kernel, kind.what), [])
        if not any(proof.covers(kind) for proof in proofs):
            found.append(variant)
    return found
