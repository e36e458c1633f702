"""What a compiled Triton kernel is made of, and the gates that it must pass; no GPU needed.

Every function works on what `triton.compile` returns for a target, in a process without
``TRITON_INTERPRET``. The machine code is read with the `cuobjdump` that triton brings along.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmqat.io import make_dir, write_text
from llmqat_kernels.backends.triton.launch import OPTIONS, Variant

ARCHS = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one thread block may have."""
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
SHARED_OF_DRIVER = 1024
"""Bytes that each block takes besides its own; cuobjdump counts them in from sm_90 on."""
WARPS_PER_SM, BLOCKS_PER_SM, REGISTERS_PER_SM, REGISTER_UNIT = 64, 32, 65_536, 256

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FAST_MATH = {
    "div_full": r"\bdiv\.full\b",
    "ftz": r"\.ftz\b",
    "approx": r"\.approx\b",
    "tf32": r"\.tf32\b",
    "fma": r"\bfma\.rn\.f32\b",
}
"""Instructions of the PTX that do not compute what the specification says."""


@dataclass(frozen=True)
class Figures:
    """Of one kernel on one architecture; memory in bytes, everything else is a count.

    Attributes:
        local: stack and local memory of a thread.
        spills: instructions that read or write local memory (STL, LDL).
        shared: static and dynamic shared memory of a thread block.
        warps: of one thread block.
        resident: warps that registers and shared memory let an SM hold (of 64).
        wide_loads, loads: global loads of 16 bytes a thread (cp.async and TMA count as such), all.
        wide_stores, stores: the same of global stores.
        float_dots: products of fp32 blocks, which are summed with FMA on the plain cores.
    """

    registers: int
    local: int
    spills: int
    shared: int
    warps: int
    resident: int
    instructions: int
    imma: int
    igmma: int
    hmma: int
    hgmma: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    div_full: int
    ftz: int
    approx: int
    tf32: int
    fma: int
    float_dots: int


def compile_variant(variant: Variant, arch: int) -> Any:
    """The kernel of ``variant`` compiled for ``sm_<arch>``, from triton's cache if it is there.

    Raises:
        ValueError: an argument of the kernel that is neither in ``signature`` nor in ``constants``,
            or a process in which kernels are interpreted.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant.kernel
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError(f"{variant.name}: kernels are interpreted here; unset TRITON_INTERPRET")
    names = list(kernel.arg_names)
    given = {*variant.signature, *variant.constants}
    if given != set(names) or len(given) != len(variant.signature) + len(variant.constants):
        odd = sorted(given ^ set(names)) or sorted({*variant.signature} & {*variant.constants})
        raise ValueError(f"{variant.name}: signature and constants do not name each of {odd} once")
    wrong = {*variant.divisible} - {n for n, t in variant.signature.items() if t[0] in "iu"}
    if wrong:
        raise ValueError(f"{variant.name}: divisible names no integer argument {sorted(wrong)}")
    aligned = {n for n, t in variant.signature.items() if t.startswith("*")} | {*variant.divisible}
    source = ASTSource(
        fn=kernel,
        signature={n: variant.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def opcodes(sass: str) -> Counter[str]:
    """How often each opcode, with its modifiers, occurs; the padding behind the code does not."""
    return Counter(code for code in _INSTRUCTION.findall(sass) if code != "NOP")


def resident_warps(registers: int, shared: int, warps: int, arch: int) -> int:
    """Warps of an SM that hold blocks of ``warps`` warps with these resources can fill."""
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        BLOCKS_PER_SM,
        WARPS_PER_SM // warps,
        REGISTERS_PER_SM // max(of_warp * warps, 1),
        SHARED_PER_SM[arch] // (shared + SHARED_OF_DRIVER),
    )
    return blocks * warps


def measure(compiled: Any, arch: int) -> Figures:
    """The figures of a compiled kernel."""
    ptx, text = compiled.asm["ptx"], disassemble(compiled.asm["cubin"])
    found = _RESOURCES.search(text)
    if found is None:
        raise ValueError(f"cuobjdump reports no resources of {compiled.metadata.name}")
    registers, stack, static, local = map(int, found.groups())
    if arch >= 90:
        static = max(static - SHARED_OF_DRIVER, 0)
    shared, warps = static + compiled.metadata.shared, compiled.metadata.num_warps
    codes = opcodes(text)

    def count(*prefixes: str, wide: bool = False) -> int:
        return sum(
            n
            for code, n in codes.items()
            if code.partition(".")[0] in prefixes and (not wide or "128" in code.split("."))
        )

    tma_loads, tma_stores = count("UTMALDG"), count("UTMASTG")
    return Figures(
        registers=registers,
        local=stack + local,
        spills=count("STL", "LDL"),
        shared=shared,
        warps=warps,
        resident=resident_warps(registers, shared, warps, arch),
        instructions=codes.total(),
        imma=count("IMMA"),
        igmma=count("IGMMA"),
        hmma=count("HMMA"),
        hgmma=count("HGMMA"),
        wide_loads=count("LDG", "LDGSTS", wide=True) + tma_loads,
        loads=count("LDG", "LDGSTS") + tma_loads,
        wide_stores=count("STG", wide=True) + tma_stores,
        stores=count("STG") + tma_stores,
        float_dots=len(re.findall(r"\btt\.dot\b.*: tensor<[^>]*xf32,", compiled.asm["ttgir"])),
        **{name: len(re.findall(pattern, ptx)) for name, pattern in FAST_MATH.items()},
    )


def cached_measure(compiled: Any, arch: int, folder: Path) -> Figures:
    """`measure`, kept in ``folder`` under the hash of the machine code and of this file."""
    parts = (
        compiled.asm["cubin"],
        compiled.asm["ptx"].encode(),
        repr((compiled.metadata.shared, compiled.metadata.num_warps)).encode(),
        Path(__file__).read_bytes(),
    )
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    path = make_dir(folder) / f"{key}.json"
    if path.is_file():
        return Figures(**json.loads(path.read_text()))
    figures = measure(compiled, arch)
    write_text(path, json.dumps(asdict(figures)))
    return figures


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


def _vector_loads(f: Figures, arch: int) -> str:
    return "" if f.wide_loads else f"none of {f.loads} global loads is of 16 bytes"


_fused = _absent("fma", "fma.rn.f32, which rounds once; multiply and add instead")

GATES: dict[str, Gate] = {
    "spills": _no_spills,
    "shared_memory": _shared,
    "div_full": _absent("div_full", "div.full, which is 2 ulp; use tl.div_rn"),
    "ftz": _absent("ftz", ".ftz, which flushes subnormals; use numerics, not libdevice"),
    "approx": _absent("approx", ".approx; use tl.div_rn, tl.sqrt_rn and numerics"),
    "tf32": _absent("tf32", "a TF32 product of fp32; pass input_precision='ieee'"),
    "fma": lambda f, arch: "" if f.float_dots else _fused(f, arch),
}
"""Of every kernel."""
PROMISES: dict[str, Gate] = {
    "int8_mma": _int8_mma,
    "int8_mma_sync": _int8_mma_sync,
    "float_mma": _float_mma,
    "vector_loads": _vector_loads,
}
"""Of variants that promise them; ``int8_mma_sync`` is for tiles too small for wgmma (M < 64)."""

APPROXIMATE = "approximate"
"""Of variants that may use ex2.approx and the like: they are held to the 2x rule, not to bits."""


def failures(figures: Figures, arch: int, promises: Sequence[str] | frozenset[str]) -> list[str]:
    """``gate: what is wrong`` of every gate that does not hold.

    Raises:
        ValueError: a promise that has no gate.
    """
    unknown = sorted(set(promises) - PROMISES.keys() - {APPROXIMATE})
    if unknown:
        raise ValueError(f"promises {unknown} have no gate; choose from {', '.join(PROMISES)}")
    gates = GATES | {name: gate for name, gate in PROMISES.items() if name in promises}
    if APPROXIMATE in promises:
        del gates["approx"]
    found = {name: gate(figures, arch) for name, gate in gates.items()}
    return [f"{name}: {what}" for name, what in found.items() if what]
