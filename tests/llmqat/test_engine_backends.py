"""Which kernels the engine would run on CUDA; nothing is launched."""

import pytest

from llmqat.runtime.forward import JOINED, OPERATORS
from llmqat_kernels import dispatch, native
from llmqat_kernels.backends import triton

EVERY = (*OPERATORS, *JOINED, "sample", "repack_weight")
CUDA_ONLY = {"attention_decode_quantize", "rope_quantize_append_queries"}
CUDA_FIRST = CUDA_ONLY | {
    "quantize", "repack_weight", "repacked_matmul", "repacked_matmul_silu_mul",
    "repacked_matmul_add", "repacked_linear", "repacked_linear_add", "rope_quantize_append",
    "attention_decode", "float_matmul", "integer_group_matmul",
}  # fmt: skip


@pytest.fixture
def cuda_machine(monkeypatch):
    if not native.build_info().get("cuda"):
        pytest.skip("the library was built without CUDA")
    monkeypatch.setattr(triton, "why_not", lambda: "")
    monkeypatch.setattr(triton, "devices", lambda: ("cuda",))
    monkeypatch.setattr(dispatch, "_announced", set())
    dispatch._resolved.cache_clear()
    yield
    dispatch._resolved.cache_clear()


@pytest.mark.parametrize(("backend", "native_ones"), [("auto", CUDA_ONLY), ("cuda", CUDA_FIRST)])
def test_every_operator_of_the_engine_has_a_kernel(backend, native_ones, cuda_machine, caplog):
    chosen = {op: dispatch.resolve(op, "cuda", backend).backend for op in EVERY}
    assert {op for op, name in chosen.items() if name == "cuda"} == native_ones
    assert set(chosen.values()) == {"cuda", "triton"}
    said = ["backend 'cuda' has no kernel for some operators (fake_quantize is the first); triton"
            " runs them"]  # fmt: skip
    assert caplog.messages == (said if backend == "cuda" else [])


def test_without_triton_the_cuda_kernels_are_not_enough(cuda_machine, monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda: "triton is not installed")
    assert dispatch.resolve("repacked_matmul", "cuda", "cuda").backend == "cuda"
    with pytest.raises(dispatch.BackendUnavailable, match=r"rms_norm: .*triton is not installed"):
        dispatch.resolve("rms_norm", "cuda", "cuda")
