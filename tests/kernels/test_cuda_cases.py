"""The calls that a device is given: they reach every path of the kernels, are what the operators
take, and are right in the emulator, where every one of them runs."""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.kernels import cuda_emulated
from tests.kernels.cuda_calls import assert_agrees, expected
from tests.kernels.cuda_cases import CASES, operators
from tests.kernels.cuda_cases import cases as cases_of

pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

from tests.kernels.cuda_paths import PATHS, paths

MULTIPROCESSORS = (16, 58, 72, 108, 114, 132, 148)
FLOATS = ("fp32", "bf16", "fp16")
ATTENTION = ("attention_decode", "attention_decode_paged", "attention_decode_quantize")


@functools.cache
def cases(op):
    """All calls of an operator on the CPU; nobody changes them."""
    return cases_of(op, "cpu")


def each(*parts):
    """The names that a choice of each part gives."""
    return {"".join(choice) for choice in product(*parts)}


# ---- what must be reached: small calls first, then what only the large ones add ----

TILES = ("x1", "x2", "x4", "x8")
LINEAR = (
    each(("W4 ", "W8 "), TILES, (": shared group", ": next group", ": two groups"))
    | each(("W4 x1", "W8 x1"), (": a stage that is not full",))
    | each(("to ", "bias "), FLOATS)
    | {"bias None", "two launches", "rows of no whole 16 bytes", "no token"}
)
EVENTS = (": split", ": two groups", ": stages that are not even")
FLOAT_LINEAR = each(("bf16 ", "fp16 "), TILES, EVENTS) | {
    "bf16 x1: whole",
    "fp16 x1: whole",
    "two launches",
    "rows of no whole 16 bytes",
}
GROUPS = each(
    ("8 tokens, ", "64 tokens, "),
    ("int4, ", "int8, "),
    ("groups of 64", "groups of 128"),
    (": split", ": whole"),
)
STORED = ("int4", "int8", "bf16 cache", "fp16 cache", "fp32 cache")
INSTANCES = each(("int4, ", "int8, "), ("64, ", "128, "), ("rotated", "as it is"))
WARPS = each(("2", "4", "8"), (" warps ",), ("apart", "together"))
HEADS = each(("tensor cores, ",), WARPS, (": 2 splits",)) | each(
    ("tensor cores, 4 warps ",),
    ("apart", "together"),
    (": query heads of two blocks", ": the last block has fewer"),
)
LARGE_HEADS = each(("tensor cores, ",), ("2", "4", "8"), (" warps apart: 3 splits",))
SCALAR = ("scalar, int8", "scalar, int4", "scalar, bf16 cache")
APPENDS = (
    each(("rows of ",), ("bf16", "fp32"), (" to int8, ", " to int4, "), ("any",))
    | each(("rows of bf16 to ",), ("int8", "int4"), (", aligned",))
    | each(("rows of ",), FLOATS, (" to int8, aligned",))
    | each(("heads of bf16 to ", "heads of fp32 to "), ("int8", "int4"))
    | {"heads of bf16 to bf16 cache", "heads of fp32 to fp16 cache", "heads of fp16 to fp32 cache"}
    | {"heads of fp16 to int8", "beyond the registers"}
)
ROWS = ("a row", "heads")
QUERIES = (
    each(("contiguous, ", "pages, "), ROWS)
    | each(("1", "3", "4"), (" queries a head, ",), ROWS)
    | each(("queries of ",), FLOATS)
    | {"rows of bf16 to int8, aligned", "rows of bf16 to int4, aligned", "heads of bf16 to int8"}
)
CODES = each(("contiguous", "pages"), (", codes of ",), ("4 bits", "8 bits"))

SMALL = {
    "quantize": {"no row"}
    | each(FLOATS, (": ",), ("vectors", "values", "warp", "block", "beyond the registers")),
    "repack_weight": {"int8 to int4", "int8 to int8", "int4 to int4"},
    "repacked_matmul": LINEAR,
    "repacked_matmul_silu_mul": each(("silu to ",), FLOATS)
    | each(("silu W4 ", "silu W8 "), ("x1", "x2", "x4"), (": shared group", ": next group")),
    "repacked_matmul_add": each(("sum ",), FLOATS)
    | each(("W4 ", "W8 "), ("x1", "x2", "x8"), (": shared group",))
    | {"two launches"},
    "repacked_linear": FLOAT_LINEAR,
    "repacked_linear_add": each(("bf16 ", "fp16 "), ("x2: split", "x8: whole"))
    | {"two launches", "rows of no whole 16 bytes"},
    "quantized_matmul": {"w int4", "w int8", "W4 x4: next group", "W8 x4: next group"},
    "quantized_linear": each(("a8 ", "a16 "), ("w int4", "w int8")) | {"bf16 x1: two groups"},
    "integer_group_matmul": GROUPS | {"any layout", "two token tiles", "two channel tiles"},
    "rope_quantize_append": APPENDS,
    "rope_quantize_append_paged": APPENDS,
    "rope_quantize_append_queries": QUERIES,
    "attention_decode": HEADS
    | each(("tensor cores, ",), INSTANCES, (": 2 splits",))
    | each(("scalar, ",), STORED, (": 2 splits",))
    | {"scalar, int8: rotated", "scalar, int4: as it is", "scalar, int8: fp16"},
    "attention_decode_paged": HEADS | each(SCALAR, (": 2 splits",)),
    "attention_decode_quantize": HEADS | CODES | each(SCALAR, (": 2 splits",)),
}
LARGE = {"repacked_matmul": {"W4 x1: shared, then whole", "W8 x1: shared, then whole"}} | {
    op: LARGE_HEADS
    | each(("tensor cores, ",), INSTANCES, (": 3 splits",))
    | {"scalar, int8: 3 splits"}
    for op in ATTENTION
}


def test_every_operator_has_its_list():
    assert set(SMALL) == set(CASES) == set(PATHS) == set(cuda_emulated.RUN)


@pytest.mark.parametrize("op", CASES)
def test_every_path_is_reached(op):
    """On every device, by the calls of compute-sanitizer alone but for the largest sizes."""
    made = cases(op)
    for sms in MULTIPROCESSORS:
        small = set().union(*(paths(op, case, sms) for case in made if case.small))
        assert SMALL[op] <= small, f"{sms} multiprocessors: {sorted(SMALL[op] - small)}"
        every = small.union(*(paths(op, case, sms) for case in made))
        wanted = LARGE.get(op, set())
        assert wanted <= every, f"{sms} multiprocessors: {sorted(wanted - every)}"


def test_a_lost_path_is_noticed():
    """A cache of one split, and a linear of one group, reach less than what is listed."""
    short = [case for case in cases("attention_decode") if case.args[1].shape[2] > 256]
    cut = [replace(c, args=(*c.args[:8], c.args[8].clamp(max=256), *c.args[9:])) for c in short]
    reached = set().union(*(paths("attention_decode", case, 132) for case in cut))
    assert not any("2 splits" in path for path in reached)
    short = [case for case in cases("repacked_matmul") if case.args[0].shape[1] < 200]
    reached = set().union(*(paths("repacked_matmul", case, 132) for case in short))
    assert not any("shared group" in path for path in reached if "then" not in path)


# ---- what the operators take ----


@pytest.mark.parametrize("op", CASES)
def test_the_arguments_fit_the_operator(op):
    """CPU tensors pass the schema and find no kernel: the dispatcher has taken every argument."""
    if op not in operators():
        pytest.skip(f"the native library has no CUDA kernel for {op}: built without nvcc")
    for case in cases(op):
        with pytest.raises(NotImplementedError, match="CPU"):
            getattr(torch.ops.llmqat_cuda, op)(*case.args)


def test_a_call_moves_as_a_whole():
    for case in cases("attention_decode_quantize")[:2]:
        there = case.on("meta")
        for one, other in zip(case.args, there.args, strict=True):
            if isinstance(one, torch.Tensor):
                assert other.is_meta and (other.shape, other.dtype) == (one.shape, one.dtype)
            else:
                assert one is other


# ---- what they give ----


def in_the_emulator(op, small):
    for index, case in enumerate(cases(op)):
        if case.small == small:
            assert_agrees(op, case, cuda_emulated.run(op, case), f"call {index}")


@pytest.mark.emulator
@pytest.mark.parametrize("op", CASES)
def test_right_in_the_emulator(op):
    in_the_emulator(op, small=True)


@pytest.mark.slow
@pytest.mark.emulator
@pytest.mark.parametrize("op", ["repacked_matmul", "repacked_linear", *ATTENTION])
def test_large_calls_are_right_in_the_emulator(op):
    in_the_emulator(op, small=False)


@pytest.mark.parametrize("op", ATTENTION[:2])
def test_tokens_that_are_left_out_are_noticed(op):
    """One tile of 16 tokens less: the limit of attention is no blank cheque."""
    for case in cases(op):
        if not case.small:
            continue
        args = list(case.args)
        lengths = 8 if op == "attention_decode" else 9
        args[lengths] = torch.where(args[lengths] > 16, args[lengths] - 16, args[lengths])
        wrong = expected(op, replace(case, args=tuple(args)))
        with pytest.raises(AssertionError, match="call"):
            assert_agrees(op, case, wrong, "call")
