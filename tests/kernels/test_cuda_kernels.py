"""The CUDA C++ kernels of the native library on a device, against the reference on the CPU."""

import pytest
import torch

from llmqat_kernels import dispatch
from llmqat_kernels.testing import assert_same_bits
from tests.kernels.cuda_cases import CASES, cases, expected, on_cpu, operators, run

APPROXIMATE = {
    "repacked_linear": 2e-2,
    "attention_decode": 2e-2,
    "attention_decode_paged": 2e-2,
    "attention_decode_quantize": 2e-2,
}
"""Tolerance of operators that are held to the 2x rule, codes of such results within one; all others
are exact."""

READERS = {"repacked_matmul", "repacked_matmul_silu_mul", "repacked_linear"}
"""Operators on a layout that only the device writes."""


def test_every_cuda_operator_has_cases():
    if not operators():
        pytest.skip("the native library has no CUDA operators: built without nvcc")
    assert set(operators()) <= CASES.keys(), "add calls to tests/kernels/cuda_cases.py"


def test_the_linears_come_with_nvcc():
    if not operators():
        pytest.skip("the native library has no CUDA operators: built without nvcc")
    linears = {"repack_weight", *READERS}
    assert linears | {"quantized_matmul", "quantized_linear"} <= set(operators())
    for op in linears:
        assert dispatch.resolve(op, "cuda", "cuda").backend == "cuda"


@pytest.mark.parametrize("op", sorted(set(CASES) - READERS))
def test_the_calls_are_legal(op):
    """On CPU tensors, by the reference: what a device would be given is what the operators take."""
    for case in cases(op, "cpu"):
        expected(op, case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", sorted(CASES))
def test_equals_the_reference(op):
    if op not in operators():
        pytest.skip(f"the native library has no CUDA kernel for {op}")
    for index, case in enumerate(cases(op)):
        want, got = expected(op, case), run(op, case)
        got = on_cpu(case.args if got is None else got)
        pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
        for one, other in pairs:
            if op in APPROXIMATE:
                limit = APPROXIMATE[op] if other.is_floating_point() else 1
                torch.testing.assert_close(one.float(), other.float(), rtol=limit, atol=limit)
            elif isinstance(other, torch.Tensor):
                assert_same_bits(one, other, f"{op} call {index}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float_activations_are_refused_where_there_is_no_kernel():
    if "repacked_linear" not in operators():
        pytest.skip("the native library has no CUDA operators: built without nvcc")
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", ["integer_group_matmul", "repacked_linear", "repacked_matmul"])
def test_split_linears_replay_in_a_graph(op):
    """Each replay finds partial sums and tickets as the first one did."""
    if op not in operators():
        pytest.skip(f"the native library has no CUDA kernel for {op}")
    case = cases(op)[0]
    want = run(op, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, case)
    for _ in range(3):
        got.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(got, want)
