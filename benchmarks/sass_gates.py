"""What the machine code of the CUDA C++ kernels must be: one table, and the gates that hold it.

A gate works on recorded figures (docs/kernels/sass.json), so a gate that changes needs no compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

ARCHS = (80, 90)
"""Architectures that the library must hold code for."""
UNPACK = ("LOP3", "PRMT", "SHF", "I2F", "I2FP", "SHL")
"""Kinds of instructions that turn packed codes into operands of an MMA."""


@dataclass(frozen=True)
class Figures:
    """Of one kernel instance on one architecture; memory in bytes, everything else is a count.

    Attributes:
        spills: instructions that read or write local memory (STL, LDL).
        shared: static shared memory of a block; a launcher may add dynamic memory.
        loop: instructions of each round of the hot loop by kind (``LDS.128``: 16 bytes a thread).
        wide_loads: global loads of 16 bytes in the loops around it, conditional ones too.
        loads: global loads to registers in the loops around it, if there are MMAs.
        covered: those that a quarter of these loops' MMAs follow before the first wait for them.
        int4_mma: MMAs on 4-bit codes, in SASS and PTX.
        tf32: SASS and PTX instructions that round to TF32.
        waits: instructions that wait for the launches before (ACQBULK of sm_90).
        early: accesses of global memory before the first of them.
        ftz, div_full, approx, fma: PTX instructions that are not what the specification says.
    """

    source: str
    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    instructions: int = 0
    int4_mma: int = 0
    ftz: int = 0
    tf32: int = 0
    div_full: int = 0
    approx: int = 0
    fma: int = 0
    wide_loads: int = 0
    waits: int = 0
    early: int = 0
    loads: int = 0
    covered: int = 0
    loop: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.source, self.name, self.arch

    def in_loop(self, *kinds: str) -> int:
        """Instructions of these kinds in the hot loop."""
        return sum(self.loop.get(kind, 0) for kind in kinds)

    @property
    def mma(self) -> int:
        """MMAs in the hot loop."""
        return sum(n for kind, n in self.loop.items() if kind.endswith("MMA"))

    @property
    def unpack_per_mma(self) -> float:
        """Bit-moving instructions of the hot loop for each of its MMAs; 0 without MMA."""
        return self.in_loop(*UNPACK) / self.mma if self.mma else 0.0


@dataclass(frozen=True)
class Expected:
    """What a kernel promises of its hot loop on every architecture.

    Attributes:
        mma: kind of MMA that must be in it, or an empty string.
        wide: global memory is read by 16 bytes a thread, in it or in the loop around it.
        unpack: most UNPACK instructions for each MMA, by architecture.
        covered: share of the loads that the MMAs must cover.
        float_math: computes floats under the 2x rule: FMA and ex2.approx are allowed.
    """

    mma: str = ""
    wide: bool = False
    unpack: Mapping[int, float] = field(default_factory=dict)
    float_math: bool = False
    covered: float = 0.0


def _both(budget: float) -> dict[int, float]:
    return dict.fromkeys(ARCHS, budget)


EXPECTED: tuple[tuple[str, Expected], ...] = (
    (r"quantize_kernel<\w+, 1>", Expected()),  # misaligned rows: single values
    (r"quantize_kernel<.*>", Expected(wide=True)),
    # Two LOP3 for the four words of a fragment, which serve every 8 tokens; int8 needs none.
    (r"integer_linear_kernel<false, \d>", Expected("IMMA", True, _both(0.1))),
    (r"integer_linear_kernel<true, 1>", Expected("IMMA", True, _both(2.1))),
    (r"integer_linear_kernel<true, 2>", Expected("IMMA", True, _both(1.1))),
    (r"integer_linear_kernel<true, \d>", Expected("IMMA", True, _both(0.6))),
    (r"float_linear_kernel<\w+, 1>", Expected("HMMA", True, _both(8.1))),
    (r"float_linear_kernel<\w+, 2>", Expected("HMMA", True, _both(4.1))),
    (r"float_linear_kernel<\w+, \d>", Expected("HMMA", True, _both(2.1))),
    (r"repack_weight_kernel", Expected()),  # once a weight
    # Packed activations: sm_80 feeds them to the int4 MMA as they are, sm_90 makes two int8 MMAs of
    # each (3 instructions a register) and shifts the sum of a segment back. 8 tokens share little.
    (r"int4_linear_kernel<8, false, \d+>", Expected("IMMA", True, {80: 0.1, 90: 8})),
    (r"int4_linear_kernel<64, false, \d+>", Expected("IMMA", True, {80: 0.2, 90: 4})),
    (r"int4_linear_kernel<8, true, \d+>", Expected("IMMA", True, _both(8))),
    (r"int4_linear_kernel<64, true, \d+>", Expected("IMMA", True, _both(4))),
    (r"int4_linear_any_kernel", Expected()),  # odd groups and storages, a warp a result
    (r"append_tokens_kernel<.*, true>", Expected(wide=True)),
    (r"append_tokens_kernel<.*>|append_heads_kernel<.*>", Expected()),  # odd heads
    # The next tile's 8 loads; that of a page's number, before them, is waited for at once.
    (r"attention_mma_kernel<false, 128, .*>", Expected("HMMA", True, {}, True, covered=0.88)),
    # A lane takes an eighth of a row: 8 bytes of 64, 4 of 32.
    (r"attention_mma_kernel<.*>", Expected("HMMA", float_math=True, covered=0.88)),
    (r"attention_scalar_kernel<.*>|combine_kernel", Expected(float_math=True)),
)
"""Pattern of the short name -> promise; the first that matches the whole name holds."""


def expected(name: str) -> Expected | None:
    """The promise of a kernel, None if it declares none."""
    for pattern, promise in EXPECTED:
        if re.fullmatch(pattern, name):
            return promise
    return None


Gate = Callable[[Figures, Expected], str]
"""Says what is wrong, or an empty string."""


def _none(name: str, what: str, unless: Callable[[Expected], bool] = lambda e: False) -> Gate:
    def gate(f: Figures, promise: Expected) -> str:
        found = getattr(f, name)
        return f"{found} {what}" if found and not unless(promise) else ""

    return gate


def _int4_mma(f: Figures, promise: Expected) -> str:
    return (
        f"{f.int4_mma} MMAs of 4-bit codes, emulated there" if f.arch >= 90 and f.int4_mma else ""
    )


def _mma(f: Figures, promise: Expected) -> str:
    missing = promise.mma and not f.in_loop(promise.mma)
    return f"no {promise.mma} in the hot loop" if missing else ""


def _wide(f: Figures, promise: Expected) -> str:
    return "no loads of 16 bytes in the loop" if promise.wide and not f.wide_loads else ""


def _wait(f: Figures, promise: Expected) -> str:
    if f.arch < 90:
        return "waits, which only sm_90 can" if f.waits else ""
    early = f"{f.early} accesses of global memory before its wait" if f.early else ""
    return early if f.waits else "no wait for the launches before its own"


def _unpack(f: Figures, promise: Expected) -> str:
    budget = promise.unpack.get(f.arch)
    if budget is None or f.unpack_per_mma <= budget:
        return ""
    return f"{f.unpack_per_mma:.2f} unpack instructions for each MMA, budget {budget:g}"


def _covered(f: Figures, promise: Expected) -> str:
    if not promise.covered or (f.loads and f.covered >= promise.covered * f.loads):
        return ""
    return f"{f.covered} of {f.loads} loads are under way over MMAs, not {promise.covered:.2f}"


GATES: dict[str, Gate] = {
    "stack": _none("stack", "bytes of stack or local memory"),
    "spills": _none("spills", "instructions that spill"),
    "int4_mma": _int4_mma,
    "ftz": _none("ftz", "instructions that flush subnormals"),
    "tf32": _none("tf32", "products in TF32"),
    "div_full": _none("div_full", "times div.full, which is 2 ulp"),
    "approx": _none("approx", "approximate instructions", lambda e: e.float_math),
    "fma": _none("fma", "fma.rn.f32, which rounds once", lambda e: e.float_math),
    "call": lambda f, _: "a call in the hot loop" if f.in_loop("CALL") else "",
    "mma": _mma,
    "wide_loads": _wide,
    "unpack": _unpack,
    "wait": _wait,
    "covered": _covered,
}


def failures(kernels: Iterable[Figures]) -> list[str]:
    """``kernel sm_NN: gate: what is wrong`` of everything that does not hold."""
    found, archs = [], dict[tuple[str, str], set[int]]()
    for f in kernels:
        label = f"{f.source or '?'} {f.name} sm_{f.arch}"
        archs.setdefault((f.source, f.name), set()).add(f.arch)
        promise = expected(f.name)
        if not f.source:
            found.append(f"{label}: source: put the kernel into an anonymous namespace")
        if promise is None:
            found.append(f"{label}: promise: declare it in benchmarks/sass_gates.py")
        said = {name: gate(f, promise or Expected()) for name, gate in GATES.items()}
        found += [f"{label}: {name}: {what}" for name, what in said.items() if what]
    for (source, name), there in archs.items():
        missing = [f"sm_{arch}" for arch in ARCHS if arch not in there]
        if missing:
            found.append(f"{source} {name}: archs: no code for {', '.join(missing)}")
    return found
