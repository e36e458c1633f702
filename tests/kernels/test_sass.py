"""The machine code of the CUDA C++ kernels: the record in docs/kernels, and the gates, which must
hold there and in the library of this machine, and must fail on code that breaks them."""

import runpy
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import setuptools

from benchmarks import sass, sass_gates, sass_report
from benchmarks.sass_gates import Expected, Figures

ROOT = Path(__file__).resolve().parents[2]


# ---- the record and the library ----


def test_the_record_is_of_these_sources():
    built, _ = sass_report.recorded()
    assert built["sources"] == sass_report.source_keys(), (
        "docs/kernels/sass.json is of other sources: run `make sass`"
    )


def test_recorded_kernels_keep_their_promises():
    built, kernels = sass_report.recorded()
    assert sass_gates.failures(kernels) == []
    assert len(kernels) >= 12 and {f.arch for f in kernels} == {80, 90}
    page = (sass_report.PAGES / "sass.md").read_text()
    assert page == sass_report.page(kernels, built["nvcc"]), "sass.md: run `make sass`"


@pytest.mark.slow
def test_the_library_keeps_its_promises():
    if not sass_report.LIBRARY.is_file() or not sass_report.nvcc_release():
        pytest.skip("the native library was built without nvcc")
    if newer := sass_report.newer_sources(sass_report.LIBRARY):
        pytest.skip(f"the native library is older than {newer[0]}: build it again")
    kernels = sass_report.of_library(sass_report.LIBRARY)
    assert sass_gates.failures(kernels) == []
    built, recorded = sass_report.recorded()
    if built["nvcc"] == sass_report.nvcc_release():
        assert sass_report.differences(kernels, recorded) == [], "run `make sass`"


# ---- keys ----


def test_keys_see_code_and_not_layout(tmp_path):
    header, source = tmp_path / "h.cuh", tmp_path / "k.cu"
    header.write_text("int f();\n")
    source.write_text('#include "h.cuh"\n#include <vector>\nint a; // "why"\n')
    key = sass_report.source_key(source, "flags")
    source.write_text('/* another\n comment */\n#include "h.cuh"\n#include <vector>\nint   a;\n')
    assert sass_report.source_key(source, "flags") == key
    assert sass_report.source_key(source, "other flags") != key
    header.write_text("int g();\n")
    assert sass_report.source_key(source, "flags") != key


def test_comments_are_not_strings():
    assert sass_report.without_comments('a("//b /*c*/"); // d') == 'a("//b /*c*/");'


def test_every_source_has_a_key_and_the_flags_stop_at_spills():
    keys, flags = sass_report.source_keys(), sass_report.build_flags()
    assert {p.name for p in (ROOT / "csrc/cuda").glob("*.cu")} == keys.keys()
    assert "-warn-spills,-Werror" in flags and "CUDA_ARCHS = ('80', '90')" in flags


# ---- reading code ----


def code(text):
    """Instructions, 16 bytes apart, one a line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return sass.parse_code([f"  /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)])


def loop_addresses(text):
    return [[i.address // 16 for i in loop.body] for loop in sass.natural_loops(code(text))]


def test_nested_loops():
    assert loop_addresses("""
        MOV R0, RZ
        IADD3 R1, R1, 0x1, RZ
        IMMA.16832.S8.S8 R4, R8.ROW, R9.COL, R4
        @P0 BRA 0x20
        @!P1 BRA 0x10
        EXIT
        BRA 0x60
    """) == [[1, 2, 3, 4], [2, 3]]


def test_code_moved_to_the_end_is_no_loop():
    assert (
        loop_addresses("""
        @P0 BRA 0x40
        MOV R0, RZ
        EXIT
        NOP
        IADD3 R1, R1, 0x1, RZ
        BRA 0x10
    """)
        == []
    )


def test_a_loop_that_is_left_by_a_call_without_return():
    """ptxas writes a far jump as a call; the function at 0x50 does return."""
    text = """
        LDG.E.128 R0, [R2.64]
        CALL.REL.NOINC 0x50
        @P0 CALL.REL.NOINC 0x40
        BRA 0x0
        EXIT
        RET.REL.NODEC R6 0x0
    """
    assert [i.kind for i in code(text)] == ["LDG.128", "CALL", "BRA", "BRA", "EXIT", "RET"]
    assert loop_addresses(text) == [[0, 1, 2, 3]]


def test_divergent_paths_meet_in_the_loop():
    assert loop_addresses("""
        BSSY B0, 0x40
        @P0 BRA 0x30
        LDS R1, [R2]
        BSYNC B0
        @P1 BRA 0x0
        EXIT
    """) == [[0, 1, 2, 3, 4]]


def test_the_hot_loop_has_the_mmas():
    kernel = sass.Kernel("k", 80, 1, 0, 0, 0, code("""
        IADD3 R1, R1, 0x1, RZ
        LOP3.LUT R1, R1, R2, RZ, 0xc0, !PT
        LDG.E.128.CONSTANT R0, [R2.64]
        @P0 BRA 0x0
        HMMA.16816.F32 R4, R8, R9, R4
        @P0 BRA 0x40
        EXIT
    """))  # fmt: skip
    assert sass.mix(kernel.hot_loop) == {"BRA": 1, "HMMA": 1}
    assert sass.mix(kernel.loops[0].body) == {"BRA": 1, "IADD3": 1, "LDG.128": 1, "LOP3": 1}


def test_the_hot_loop_leaves_out_what_is_not_in_every_round():
    kernel = sass.Kernel("k", 80, 1, 0, 0, 0, code("""
        IMMA.16832.S8.S8 R4, R8.ROW, R9.COL, R4
        @!P0 BRA 0x50
        F2F.BF16.F32 R1, R2
        STG.E [R2.64], R1
        @P2 BRA 0x20
        @P1 BRA 0x0
        EXIT
    """))  # fmt: skip
    assert [len(loop.body) for loop in kernel.loops] == [6, 3]
    assert sass.mix(kernel.hot_loop) == {"BRA": 2, "IMMA": 1}


def encoded(scoreboard, *waits):
    """The upper half of an instruction's encoding."""
    return f"/* 0x{scoreboard << 46 | sum(1 << 52 + n for n in waits):016x} */"


def test_the_way_of_a_load():
    """K is loaded before the second product and V after it, both on scoreboard 5, as it was."""
    lines = [
        ("HMMA.16816.F32 R4, R8, R9, R4", encoded(7, 5)),
        ("LDG.E R1, [R2.64]", encoded(2)),
        ("IADD3 R2, R1, R2, RZ", encoded(7, 2)),
        ("LDG.E.128.CONSTANT R8, [R2.64]", encoded(5)),
        ("HMMA.16816.F32 R4, R12, R13, R4", encoded(7)),
        ("LDG.E.128.CONSTANT R12, [R2.64]", encoded(5)),
        ("@P0 BRA 0x0", encoded(7)),
    ]
    text = [line for k, (i, c) in enumerate(lines) for line in (f"  /*{16 * k:04x}*/  {i} ;", c)]
    loop = sass.parse_code(text)
    assert [i.scoreboard for i in loop] == [None, 2, None, 5, None, 5, None]
    assert loop[0].waits == {5} and loop[2].waits == {2}
    assert sass.under_way(loop) == [0, 1, 0]


def test_names():
    anonymous = "44_GLOBAL__N__7fda3ae2_11_quantize_cu_e906fea0"
    symbol = f"_ZN6llmqat{anonymous}15quantize_kernelINS_4fp16ELi8EEEvPKT_llibPaPf"
    kernel = sass.Kernel(symbol, 80, 1, 0, 0, 0, ())
    assert (kernel.name, kernel.source) == ("quantize_kernel<fp16, 8>", "quantize.cu")
    assert sass.short_name("void a::f<b::C<(int)4, true>, -1>(int, float)") == "f<C<4, true>, -1>"


# ---- gates ----

HOPPER = {"arch": 90, "waits": 1}
GOOD = Figures(
    "gemm.cu", "gemm_kernel<8>", 80, wide_loads=2, loads=9, covered=8, loop={"IMMA": 4, "LOP3": 4}
)
PROMISE = Expected("IMMA", True, {80: 1.0, 90: 1.0}, covered=0.88)


@pytest.fixture
def promised(monkeypatch):
    monkeypatch.setattr(sass_gates, "EXPECTED", ((r"gemm_kernel<\d>", PROMISE),))


def test_good_figures_pass(promised):
    assert sass_gates.failures([GOOD, replace(GOOD, **HOPPER)]) == []


@pytest.mark.parametrize(
    "gate, changes",
    [
        ("stack", {"stack": 8}),
        ("spills", {"spills": 1}),
        ("int4_mma", {"int4_mma": 1}),
        ("ftz", {"ftz": 1}),
        ("tf32", {"tf32": 1}),
        ("div_full", {"div_full": 1}),
        ("approx", {"approx": 1}),
        ("fma", {"fma": 1}),
        ("call", {"loop": GOOD.loop | {"CALL": 1}}),
        ("mma", {"loop": {"LDG.128": 2}}),
        ("wide_loads", {"wide_loads": 0}),
        ("unpack", {"loop": GOOD.loop | {"PRMT": 1}}),
        ("wait", {"early": 1, "waits": 1}),
        ("covered", {"loads": 9, "covered": 4}),
        ("covered", {"loads": 0, "covered": 0}),
        ("source", {"source": ""}),
        ("promise", {"name": "another_kernel"}),
    ],
)
def test_each_gate_fails_on_what_it_is_for(promised, gate, changes):
    pair = [replace(GOOD, **changes), replace(GOOD, **HOPPER | changes)]
    found = sass_gates.failures(pair)
    assert found and all(f" {gate}: " in line for line in found)
    assert len(found) == (1 if gate == "int4_mma" else 2)  # sm_80 has them


def test_a_kernel_that_never_waits(promised):
    said = "gemm.cu gemm_kernel<8> sm_90: wait: no wait for the launches before its own"
    assert sass_gates.failures([GOOD, replace(GOOD, arch=90)]) == [said]


def test_a_missing_architecture(promised):
    assert sass_gates.failures([GOOD]) == ["gemm.cu gemm_kernel<8>: archs: no code for sm_90"]


def test_float_kernels_may_approximate(monkeypatch):
    monkeypatch.setattr(sass_gates, "EXPECTED", ((".*", Expected(float_math=True)),))
    good = replace(GOOD, approx=3, fma=9)
    pair = [good, replace(good, **HOPPER)]
    assert sass_gates.failures(pair) == []


def test_the_record_reads_back(tmp_path):
    (tmp_path / "sass.json").write_text(sass_report.record([GOOD], "13.0", {"gemm.cu": "0"}))
    assert sass_report.recorded(tmp_path) == ({"nvcc": "13.0", "sources": {"gemm.cu": "0"}}, [GOOD])
    other = replace(GOOD, registers=9)
    said = "gemm.cu gemm_kernel<8> sm_80: registers 9, recorded 0"
    assert sass_report.differences([other], [GOOD]) == [said]


# ---- planted faults, compiled ----

SPILL = """
namespace { __global__ void __launch_bounds__(1024, 2) spill_kernel(float* p, int n) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];
  for (int r = 0; r < n; ++r) {
    #pragma unroll
    for (int i = 0; i < 64; ++i) v[i] += v[(i + 17) % 64] * v[(i + 40) % 64];
  }
  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = v[i];
} }
void launch(float* p, int n) { spill_kernel<<<1, 1024>>>(p, n); }
"""
INT4 = """
#include "llmqat/arch.cuh"
namespace { __global__ void int4_kernel(int* p) {
  int acc[4] = {p[0], p[1], p[2], p[3]};
  for (int i = 0; i < p[4]; ++i) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3},"
                 " {%0, %1, %2, %3}, {%0, %1}, {%0, %1, %2, %3};"
                 : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3]));
  }
  p[threadIdx.x] = acc[0] + acc[1] + acc[2] + acc[3];
} }
void launch(int* p) { int4_kernel<<<1, 32>>>(p); }
"""


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """compile(text) as the build does; skips without nvcc."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    try:
        path = build["find_nvcc"]().path
    except build["Missing"] as problem:
        pytest.skip(f"no nvcc: {problem}")
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in build["CUDA_ARCHS"]]
    last = build["CUDA_ARCHS"][-1]
    archs.append(f"-gencode=arch=compute_{last},code=compute_{last}")

    def compile_source(text):
        source, output = tmp_path / "planted.cu", tmp_path / "planted.o"
        source.write_text(text)
        include = ["-I", str(ROOT / "csrc/include")]
        command = [path, *build["NVCC_FLAGS"], *archs, *include, "-c", str(source), "-o", output]
        return output, subprocess.run(command, capture_output=True, text=True, check=False)

    return compile_source


@pytest.mark.slow
def test_a_planted_spill_fails_the_build(nvcc):
    _, done = nvcc(SPILL)
    assert done.returncode != 0 and "spill" in done.stderr


@pytest.mark.slow
def test_a_planted_int4_mma_is_found_on_sm_90(nvcc):
    output, done = nvcc(INT4)
    assert done.returncode == 0, done.stderr
    found = sass_gates.failures(sass_report.of_library(output))
    assert any("int4_kernel sm_90: int4_mma" in line for line in found)
    assert any("int4_kernel sm_90: call" in line for line in found)
    assert not any("sm_80: int4_mma" in line for line in found)
