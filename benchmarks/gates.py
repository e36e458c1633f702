"""The gates of a compiled Triton kernel, as functions of its figures (benchmarks/cubin.py).

A gate that changes is applied to the figures that docs/kernels records; nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.cubin import SHARED_LIMIT, Figures

Gate = Callable[[Figures, int], str]
"""Says what is wrong, or an empty string."""


def _no_spills(f: Figures, arch: int) -> str:
    if not f.spills and not f.local:
        return ""
    return f"{f.spills} spill instructions, {f.local} bytes of local memory"


def _shared(f: Figures, arch: int) -> str:
    limit = SHARED_LIMIT[arch]
    return "" if f.shared <= limit else f"{f.shared} bytes of shared memory exceed {limit}"


def _absent(name: str, what: str) -> Gate:
    return lambda f, arch: f"{getattr(f, name)} times {what}" if getattr(f, name) else ""


def _int8_mma(f: Figures, arch: int) -> str:
    if arch >= 90:
        return "" if f.igmma else f"no IGMMA (wgmma of int8); {f.imma} IMMA"
    return "" if f.imma else "no IMMA"


def _int8_mma_sync(f: Figures, arch: int) -> str:
    return "" if f.imma or f.igmma else "neither IMMA nor IGMMA"


def _float_mma(f: Figures, arch: int) -> str:
    return "" if f.hmma or f.hgmma else "neither HMMA nor HGMMA"


def _proven_silu(f: Figures, arch: int) -> str:
    if f.reciprocals and f.fma == FMAS_OF_SILU * f.reciprocals:
        return ""
    return f"{f.fma} FMAs and {f.reciprocals} reciprocals are not those of silu_of_16_bits"


def _vector_loads(f: Figures, arch: int) -> str:
    return "" if f.wide_loads else f"none of {f.loads} global loads is of 16 bytes"


_fused = _absent("fma", "fma.rn.f32, which rounds once; multiply and add instead")

GATES: dict[str, Gate] = {
    "spills": _no_spills,
    "shared_memory": _shared,
    "div_full": _absent("div_full", "div.full, which is 2 ulp; use tl.div_rn"),
    "ftz": _absent("ftz", ".ftz, which flushes subnormals; use numerics, not libdevice"),
    "approx": _absent("approx", ".approx; use tl.div_rn, tl.sqrt_rn and numerics"),
    "reciprocals": _absent("reciprocals", "rcp.approx.ftz, which is 1 ulp; use tl.div_rn"),
    "tf32": _absent("tf32", "a TF32 product of fp32; pass input_precision='ieee'"),
    "fma": lambda f, arch: "" if f.float_dots else _fused(f, arch),
}
"""Of every kernel."""
FMAS_OF_SILU = 6 + 3 + 2
"""Of one exponential's polynomial, its reduction, and the division."""
PROMISES: dict[str, Gate] = {
    "int8_mma": _int8_mma,
    "int8_mma_sync": _int8_mma_sync,
    "float_mma": _float_mma,
    "vector_loads": _vector_loads,
    "proven_silu": _proven_silu,
}
"""Of variants that promise them; ``int8_mma_sync`` is for tiles too small for wgmma (M < 64).
``proven_silu`` stands for the FMAs and reciprocals of numerics.silu_of_16_bits, for no others."""
APPROXIMATE = "approximate"
"""Of variants that may use ex2.approx and the like: they are held to the 2x rule, not to bits."""
WAIVED = {
    "proven_silu": ("fma", "reciprocals"),
    APPROXIMATE: ("approx", "reciprocals"),
}
"""Gates that a promise takes the place of."""


def failures(figures: Figures, arch: int, promises: Sequence[str] | frozenset[str]) -> list[str]:
    """``gate: what is wrong`` of every gate that does not hold.

    Raises:
        ValueError: a promise that has no gate.
    """
    unknown = sorted(set(promises) - PROMISES.keys() - {APPROXIMATE})
    if unknown:
        raise ValueError(f"promises {unknown} have no gate; choose from {', '.join(PROMISES)}")
    gates = GATES | {name: gate for name, gate in PROMISES.items() if name in promises}
    waived = {name for promise in promises for name in WAIVED.get(promise, ())}
    found = {name: gate(figures, arch) for name, gate in gates.items() if name not in waived}
    return [f"{name}: {what}" for name, what in found.items() if what]
