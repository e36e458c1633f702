"""The registry accounts for every operator, and every entry passes its own gate on small sizes."""

import dataclasses

import pytest
import torch

from benchmarks.entry import Shape, check_baselines
from benchmarks.registry import ENTRIES, NOT_ON_ITS_OWN, Case, cases, op_names
from llmqat_kernels.errors import InvalidArgument
from llmqat_kernels.schemas import SCHEMAS

SMALL = {"rows": 4, "C": 64, "M": 2, "N": 64, "K": 64, "n": 2, "T": 16, "V": 128}
CPU = torch.device("cpu")


def small(entry):
    """The entry's first shape with sizes that take no time; heads stay as they are."""
    sizes = entry.any_grid.shapes[0].sizes
    return Shape("small", {name: SMALL.get(name, value) for name, value in sizes.items()})


SMALL_CASES = [
    Case(entry, small(entry), dtype)
    for entry in ENTRIES
    for dtype in dict.fromkeys((*entry.cpu.dtypes, *entry.cuda.dtypes))
]


def test_every_schema_is_measured_or_says_where():
    assert set(op_names()) | set(NOT_ON_ITS_OWN) == set(SCHEMAS)
    assert not set(op_names()) & set(NOT_ON_ITS_OWN)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_have_names_of_their_own(device):
    rows = [(case.name, case.shape.label, case.dtype) for case in cases(device_type=device)]
    entries = [entry for entry in ENTRIES if entry.grid(device).shapes]
    assert len(rows) == len(set(rows)) > len(entries)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_is_one_row_an_entry(device):
    expected = [entry for entry in ENTRIES if entry.grid(device).shapes]
    assert [case.entry for case in cases(quick=True, device_type=device)] == expected


def test_every_entry_is_measured_somewhere():
    assert all(entry.cpu.shapes or entry.cuda.shapes for entry in ENTRIES)


def test_the_gpu_has_the_sizes_of_the_bars():
    rows = {(case.name, case.shape.sizes.get("M")) for case in cases(device_type="cuda")}
    for bits in (8, 4):
        assert {(f"repacked_matmul W{bits}A8", m) for m in (128, 1024, 4096)} <= rows
    for case in cases(["rms_norm_quantize", "silu_mul_quantize"], device_type="cuda"):
        assert case.shape["rows"] >= 2048


def test_a_chosen_operator_brings_all_its_variants():
    variants = {case.entry.variant for case in cases(["quantized_linear"], quick=True)}
    assert variants == {"W8A8", "W4A8", "W4A16"}


@pytest.mark.parametrize(
    ("op", "hint"),
    [
        ("nonsense", "use quantize"),
        ("rope", "rope_quantize"),
        ("qat_matmul", "no sizes on cpu"),
    ],
)
def test_an_operator_without_an_entry_is_an_error_with_a_hint(op, hint):
    with pytest.raises(InvalidArgument, match=hint):
        list(cases([op]))


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: f"{case.name}-{case.dtype_name}")
def test_gate_and_baselines_agree(case):
    job = case.build(CPU)
    job.gate()
    check_baselines(job)
    assert job.baselines
    for baseline in job.baselines.values():
        baseline()


def test_floors_are_positive_and_grow_with_the_shape():
    for entry in ENTRIES:
        grid = entry.any_grid
        for dtype in grid.dtypes:
            assert entry.bytes(small(entry), dtype) > 0
            floors = [entry.bytes(shape, dtype) for shape in (small(entry), grid.shapes[0])]
            assert floors[0] < floors[1] or grid.shapes[0]["n"] == 1
            assert entry.flops(small(entry), dtype) >= 0


def test_floors_by_hand():
    """W4A8 at M=2 N=64 K=64 in fp32; quantize of 4 x 64 bf16; KV4 serving of one token."""
    found = {(case.name, case.dtype): case.cost for case in SMALL_CASES}
    linear = found["quantized_linear W4A8", torch.float32]
    assert (linear.bytes, linear.flops, linear.int_ops) == (
        64 * 64 // 2 + 64 * 4 + (2 * 64 + 2 * 64) * 4,
        0,
        2 * 2 * 64 * 64,
    )
    assert found["quantize 8 bit", torch.bfloat16].bytes == 4 * 64 * 3 + 4 * 4
    decode = found["attention_decode KV4 serving", torch.float32]
    codes, scales, ends = 2 * 2 * 16 * 3 * 32, 2 * 2 * 16 * 3 * 4, 2 * 2 * 9 * 64 * 4
    assert decode.bytes == codes + scales + ends
    assert decode.flops == 4 * 2 * 9 * 16 * 64
    paper = found["attention_decode KV4 paper", torch.float32]
    assert paper.bytes == codes + scales // 3 + ends + 16 * 64 * 4
    assert paper.flops == decode.flops + 3 * 2 * 3 * 16 * 64


@pytest.mark.parametrize("op", ["rope_quantize_append", "attention_decode"])
def test_every_kind_of_cache_is_measured(op):
    kinds = {f"KV{bits} {mode}" for bits in (8, 4) for mode in ("paper", "serving")}
    for device in ("cpu", "cuda"):
        assert {case.entry.variant for case in cases([op], device_type=device)} == kinds


def test_a_baseline_that_computes_something_else_is_refused():
    job = SMALL_CASES[0].build(CPU)
    other = dataclasses.replace(job, baselines={"zeros": lambda: job.call()[0] * 0})
    with pytest.raises(AssertionError, match="zeros: differs"):
        check_baselines(other)
    short = dataclasses.replace(job, baselines={"short": lambda: job.call()[0][1:]})
    with pytest.raises(AssertionError, match="short: shape"):
        check_baselines(short)
