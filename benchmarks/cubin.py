"""What a compiled Triton kernel is made of, counted with no GPU.

Every function works on what `triton.compile` returns for a target, in a process without
``TRITON_INTERPRET``. The machine code is read with the `nvdisasm` and `cuobjdump` that
triton brings along.
"""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FAST_MATH = {
    "div_full": r"\bdiv\.full\b",
    "ftz": r"(?<!\brcp\.approx)\.ftz\b",
    "approx": r"(?<!\brcp)\.approx\b|\brcp\.approx\b(?!\.ftz)",
    "reciprocals": r"\brcp\.approx\.ftz\b",
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
    reciprocals: int
    tf32: int
    fma: int
    float_dots: int


def multiples_of_16(variant: Variant) -> list[str]:
    """The arguments that the compiler may take for multiples of 16: pointers, and integers."""
    if not variant.aligned:
        return []
    names = [
        parameter.name for parameter in variant.kernel.params if not parameter.do_not_specialize
    ]
    return sorted(name for name in names if variant.signature.get(name, "f")[0] in "*iu")


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
    aligned = multiples_of_16(variant)
    source = ASTSource(
        fn=kernel,
        signature={n: variant.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def code_of(cubin: bytes) -> bytes:
    """The machine code of the only kernel in a cubin: its ``.text`` section.

    Raises:
        ValueError: none or several kernels.
    """
    (sections_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_at + i * size) for i in range(count)]
    names = cubin[sections[names_index][4] :]
    found = [s[4:6] for s in sections if names[s[0] :].startswith(b".text.")]
    if len(found) != 1:
        raise ValueError(f"the cubin holds {len(found)} kernels instead of one")
    start, length = found[0]
    return cubin[start : start + length]


def disassemble(codes: Sequence[bytes], arch: int) -> list[str]:
    """The SASS of each piece of machine code, as text.

    One process for all: it takes a third of a second to start and no time for a kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        lines = _run("nvdisasm", "--binary", f"SM{arch}", file.name).splitlines()
    ends = list(itertools.accumulate(map(len, codes)))
    texts: list[list[str]] = [[] for _ in codes]
    for line in lines:
        address = _ADDRESS.match(line)
        if address:
            texts[bisect.bisect_right(ends, int(address[1], 16))].append(line)
    return ["\n".join(text) for text in texts]


def _run(tool: str, *arguments: str) -> str:
    import triton

    command = [str(Path(triton.__file__).parent / "backends/nvidia/bin" / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers and bytes of stack, static shared and local memory of the kernel in a cubin.

    Raises:
        ValueError: cuobjdump reports none.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = _RESOURCES.search(_run("cuobjdump", "-res-usage", file.name))
    if found is None:
        raise ValueError("cuobjdump reports no resources of a kernel")
    registers, stack, static, local = map(int, found.groups())
    return registers, stack, static, local


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


def measure(kernels: Sequence[Any], arch: int) -> list[Figures]:
    """The figures of compiled kernels of one architecture."""
    texts = disassemble([code_of(kernel.asm["cubin"]) for kernel in kernels], arch)
    return [_figures(kernel, text, arch) for kernel, text in zip(kernels, texts, strict=True)]


def _figures(compiled: Any, sass: str, arch: int) -> Figures:
    registers, stack, static, local = resources(compiled.asm["cubin"])
    if arch >= 90:
        static = max(static - SHARED_OF_DRIVER, 0)
    shared, warps = static + compiled.metadata.shared, compiled.metadata.num_warps
    ptx, codes = compiled.asm["ptx"], opcodes(sass)

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
