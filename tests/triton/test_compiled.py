"""Every form of every Triton kernel, compiled for sm_80 and sm_90 with no GPU: does it keep the
gates of benchmarks/gates.py? And does each gate notice what it is there for?

Compilation runs in another process, for in this one kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import cubin, gates
from benchmarks.kernel_forms import kernels_of, modules, selected
from benchmarks.kernel_pages import RECORDS
from benchmarks.kernel_report import CACHE, PAGES
from llmqat_kernels.backends import triton
from llmqat_kernels.backends.triton.launch import Variant

ROOT = Path(__file__).resolve().parents[2]
FIGURES = cubin.Figures(
    **(dict.fromkeys(cubin.Figures.__dataclass_fields__, 0) | {"registers": 32, "warps": 4})
)


def python(*arguments):
    """Run a module without the interpreter, with the cache of `kernel_report`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(CACHE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def report(*options):
    done = python("benchmarks.kernel_report", "--json", *options)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def recorded():
    """What docs/kernels shows: the release of triton, and the results."""
    return json.loads((PAGES / RECORDS).read_text())


def form_of(result):
    return result["module"], result["name"], result["arch"]


def triton_operators():
    return {op for module in modules() for op in kernels_of(module).KERNELS}


def counted(failures):
    """Another release's compiler may spill a register; it must not change what is computed."""
    other = recorded()["triton"] != version("triton")
    return [said for said in failures if not (other and said.startswith("spills: "))]


def assert_every_gate_holds(results):
    wrong = [
        f"{r['module']}/{r['name']} sm_{r['arch']}: {said}"
        for r in results
        for said in counted(r["failures"])
    ]
    assert not wrong, "\n".join(wrong)
    assert {r["arch"] for r in results} == set(cubin.ARCHS)
    # A file without variants would pass every gate.
    assert {r["module"] for r in results} == set(triton.MODULES)


def test_one_form_of_every_kernel_keeps_the_gates():
    assert_every_gate_holds(report("--quick"))


def test_the_pages_have_every_form_and_every_gate_held():
    pages = recorded()["kernels"]
    assert [form_of(result) for result in pages] == selected([], cubin.ARCHS)
    assert [result for result in pages if result.get("failures")] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_form_of_every_kernel_keeps_the_gates():
    """Each form whose content key is not the recorded one is compiled, and a sample of the others
    that changes with the commit; `make check-kernels` compiles all.
    """
    if recorded()["triton"] != version("triton"):
        pytest.skip(f"docs/kernels is of triton {recorded()['triton']}")
    done = python("benchmarks.kernel_report", "--check", "--verify", "60")
    print(done.stderr)  # the seed
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_random_calls_launch_is_proven_by_a_form_that_is_compiled():
    """Any size, layout, dtype and alignment, specialized by Triton's own JIT."""
    done = python("tests.triton.launched_kernels")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["uncovered"] == []
    assert found["forms"] > 1000
    # repack_weight launches nothing, repacked_linear what dequantize launches.
    assert len(found["operators"]) == len(triton_operators()) - 2


@pytest.fixture(scope="module")
def said():
    """What the gates say of kernels that break them."""
    done = python("tests.triton.bad_kernels")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", cubin.ARCHS)
@pytest.mark.parametrize("gate", [*gates.GATES, *gates.PROMISES])
def test_a_kernel_that_breaks_a_gate_is_named(said, gate, arch):
    if gate == "approx":  # libdevice.rsqrt has both
        gate = "ftz"
        assert any(line.startswith("approx: ") for line in said[f"ftz {arch}"])
    if gate == "int8_mma_sync":
        promise = gates.failures(FIGURES, arch, ["int8_mma_sync"])
        assert promise == ["int8_mma_sync: neither IMMA nor IGMMA"]
        return
    assert any(line.startswith(f"{gate}: ") for line in said[f"{gate} {arch}"])


@pytest.mark.parametrize("arch", cubin.ARCHS)
def test_clean_kernels_keep_every_gate(said, arch):
    names = [name for name in said if name.startswith("clean") and name.endswith(f" {arch}")]
    assert len(names) == 4 and not any(counted(said[name]) for name in names)


def test_wgmma_is_asked_of_sm_90_only(said):
    """A tile of 16 rows has no wgmma: on sm_90 the promise says so, on sm_80 it holds."""
    assert said["int8_mma small 80"] == []
    assert said["int8_mma small 90"] == ["int8_mma: no IGMMA (wgmma of int8); 2 IMMA"]


def test_approximate_kernels_may_say_so():
    fast = replace(FIGURES, approx=3, reciprocals=1)
    assert gates.failures(fast, 80, ["approximate"]) == []
    approx, reciprocals = gates.failures(fast, 80, [])
    assert approx.startswith("approx: 3 times .approx")
    assert reciprocals.startswith("reciprocals: 1 times rcp.approx.ftz")


def test_the_proven_silu_is_the_only_excuse_for_its_instructions():
    own = replace(FIGURES, reciprocals=8, fma=88)
    assert gates.failures(own, 90, ["proven_silu"]) == []
    assert len(gates.failures(own, 90, [])) == 2
    for other in (replace(own, fma=89), replace(own, reciprocals=0, fma=0)):
        (said,) = gates.failures(other, 90, ["proven_silu"])
        assert said.startswith("proven_silu: ")


def test_a_promise_without_a_gate_is_an_error():
    with pytest.raises(ValueError, match="'speed'"):
        gates.failures(FIGURES, 90, ["speed"])


def test_interpreted_kernels_are_refused():
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        cubin.compile_variant(Variant("x", object(), {}, {}), 90)


def test_opcodes():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x1 */
                                                                             /* 0x2 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x3 */
        /*0020*/            @!UPT UIADD3 URZ, URZ, URZ, URZ ;                /* 0x4 */
        /*0030*/                 { HADD2.F32 R1, -RZ, R2.H0_H0 ;             /* 0x5 */
        /*0040*/                   STL [R1+0x8], R2 ;                        /* 0x6 */
        /*0050*/                   NOP ;                                     /* 0x7 */
    """
    names = {"LDC", "LDG.E.128", "UIADD3", "HADD2.F32", "STL"}
    assert cubin.opcodes(sass) == dict.fromkeys(names, 1)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "resident"),
    [
        (32, 0, 4, 80, 64),
        (128, 0, 8, 90, 16),
        (255, 0, 4, 80, 8),
        (64, 100 * 1024, 4, 90, 8),
        (16, 0, 1, 80, 32),  # blocks a multiprocessor
    ],
)
def test_resident_warps(registers, shared, warps, arch, resident):
    assert cubin.resident_warps(registers, shared, warps, arch) == resident
