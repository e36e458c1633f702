"""The CUDA C++ kernels of the native library on a device, against the reference on the CPU."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llmqat_kernels import dispatch
from llmqat_kernels.testing import assert_same_bits
from tests.kernels.cuda_calls import assert_agrees, on_cpu, outcome
from tests.kernels.cuda_cases import CASES, cases, operators, run

on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRAPHS = (
    "integer_group_matmul", "repacked_linear", "repacked_linear_add", "repacked_matmul",
    "repacked_matmul_add", "repacked_matmul_silu_mul",
    "attention_decode", "attention_decode_quantize",
)  # fmt: skip
"""Operators whose blocks of threads wait for each other by tickets, or whose splits are added."""


def test_every_cuda_operator_has_cases():
    if not operators():
        pytest.skip("the native library has no CUDA operators: built without nvcc")
    assert set(operators()) <= CASES.keys(), "add calls to tests/kernels/cuda_cases.py"


def test_the_linears_come_with_nvcc():
    if not operators():
        pytest.skip("the native library has no CUDA operators: built without nvcc")
    linears = {
        "repack_weight", "repacked_matmul", "repacked_matmul_silu_mul", "repacked_matmul_add",
        "repacked_linear", "repacked_linear_add",
    }  # fmt: skip
    assert linears | {"quantized_matmul", "quantized_linear"} <= set(operators())
    for op in linears:
        assert dispatch.resolve(op, "cuda", "cuda").backend == "cuda"


def there(op):
    """Skips the test if the library has no CUDA kernel for ``op``."""
    if op not in operators():
        pytest.skip(f"the native library has no CUDA kernel for {op}")


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("op", CASES)
def test_equals_the_reference(op):
    there(op)
    for index, case in enumerate(cases(op, "cpu")):
        here = case.on("cuda")
        got = run(op, here)
        assert_agrees(op, case, on_cpu(outcome(op, here.args, got)), f"call {index}")


def result(op, case):
    """What a call gives, on the CPU: tensors, those of its arguments if it writes to them."""
    got = outcome(op, case.args, run(op, case))
    found = got if isinstance(got, tuple) else (got,)
    return [on_cpu(each) for each in found if isinstance(each, torch.Tensor)]


def activations(op):
    """How many of its arguments, from the first on, are activations of any layout."""
    return {"rope_quantize_append_queries": 3}.get(op, 2 if op.startswith("rope_q") else 1)


def misaligned(tensor):
    """A contiguous copy that begins at no multiple of 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("op", [op for op in CASES if op != "repack_weight"])
def test_misaligned_activations_give_the_same_bits(op):
    """Views of the first argument (and of k and v, in an append) at any address."""
    there(op)
    count = activations(op)
    for index, case in enumerate(cases(op, small=True)):
        if case.args[0].numel() == 0:
            continue
        other = case.on("cuda")
        moved = tuple(misaligned(x) for x in other.args[:count])
        changed = replace(other, args=(*moved, *other.args[count:]))
        both = zip(result(op, changed), result(op, case), strict=True)
        for number, (one, two) in enumerate(both):
            assert_same_bits(one, two, f"{op} call {index}, tensor {number}")


def apart(tensor, gap):
    """A copy whose rows (of all but the first dimension) have a gap after them."""
    wide = tensor.new_empty(tensor.shape[0], tensor[0].numel() + gap)
    return wide[:, : tensor[0].numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("gap", [64, 3])
@pytest.mark.parametrize("op", [op for op in CASES if op != "repack_weight"])
def test_views_give_the_same_bits(op, gap):
    """Activations that are parts of a larger product, with vector loads and without."""
    there(op)
    count = activations(op)
    for index, case in enumerate(cases(op, small=True)):
        if case.args[0].numel() == 0:
            continue
        other = case.on("cuda")
        moved = tuple(apart(x, gap) for x in other.args[:count])
        changed = replace(other, args=(*moved, *other.args[count:]))
        both = zip(result(op, changed), result(op, case), strict=True)
        for number, (one, two) in enumerate(both):
            assert_same_bits(one, two, f"{op} call {index}, tensor {number}")


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("op", ["repacked_matmul", "repacked_matmul_silu_mul", "repacked_linear"])
def test_misaligned_packed_weights_are_refused(op):
    """They are loaded 16 bytes at a time: on a device the load would end the CUDA context."""
    there(op)
    case = cases(op, small=True)[0]
    place = 1 if op == "repacked_linear" else 2
    args = list(case.args)
    args[place] = misaligned(args[place])
    with pytest.raises(RuntimeError, match="w: expected memory aligned to 16 bytes"):
        getattr(torch.ops.llmqat_cuda, op)(*args)
    run(op, case)
    torch.cuda.synchronize()


@pytest.mark.gpu
@on_device
def test_float_activations_are_refused_where_there_is_no_kernel():
    there("repacked_linear")
    x, scale = torch.randn(2, 392, device="cuda"), torch.ones(70, device="cuda")
    codes = torch.zeros(70, 392, dtype=torch.int8, device="cuda")
    layouts = {bits: torch.ops.llmqat_cuda.repack_weight(codes, bits) for bits in (4, 8)}
    half = x.to(torch.bfloat16)
    for args, match in (
        ((x, layouts[4], scale, None, 70, 4, -1), "fp16 or bf16"),
        ((half, layouts[8], scale, None, 70, 8, -1), "2 to 4 bits"),
        ((half, layouts[4], scale, None, 70, 4, 56), "group_size"),
        ((half, layouts[8], scale, None, 70, 4, -1), "no 4-bit weight"),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.llmqat_cuda.repacked_linear(*args)


@pytest.mark.gpu
@on_device
def test_overlapping_launches_give_the_same_bits():
    """The switch is read once, so in a process of its own; by streams and by graphs."""
    if not operators() or "LLMQAT_PDL" in os.environ:
        pytest.skip("the native library was built without nvcc, or this is that process")
    chosen = "equals_the_reference or replay_in_a_graph"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen, __file__]
    done = subprocess.run(
        command, env=os.environ | {"LLMQAT_PDL": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("op", GRAPHS)
def test_split_calls_replay_in_a_graph(op):
    """Each replay finds partial sums and tickets as the first one did."""
    there(op)
    first = [case for case in cases(op, small=True) if case.args[0].numel()][:4]
    for case in first:
        want = result(op, case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(op, case)
        outputs = got if isinstance(got, tuple) else (got,)
        for _ in range(3):
            for output in outputs:
                output.zero_()
            graph.replay()
            torch.cuda.synchronize()
            for one, other in zip(on_cpu(outputs), want, strict=True):
                assert_same_bits(one, other, op)
