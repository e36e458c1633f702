"""Backend selection: named backends never fall back, `auto` says what it chose."""

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels import dispatch, native
from llmqat_kernels.backends import triton
from llmqat_kernels.backends.composite import COMPOSITES
from llmqat_kernels.backends.reference import REFERENCE
from llmqat_kernels.schemas import SCHEMAS


def test_every_operator_has_schema_reference_and_fake():
    from llmqat_kernels.ops import FAKES

    assert set(SCHEMAS) == set(REFERENCE) == set(FAKES)
    for op in SCHEMAS:
        assert getattr(torch.ops.llmqat, op).default is not None


def test_three_backends_are_collected():
    """The shared `backend` fixture must really run on every backend wherever it is installed."""
    from tests.conftest import BACKENDS

    assert BACKENDS == ["reference", "cpu", "triton"]
    if triton.interpreting() and not triton.why_not():
        assert dispatch.resolve("quantize", "cpu", "triton").backend == "triton"
    if native.is_available():
        missing = [c.op for c in dispatch.choices("cpu") if c.backend != "cpu"]
        assert missing == []


def test_use_backend_restores():
    before = qk.current_backend()
    with qk.use_backend("reference"):
        assert qk.current_backend() == "reference"
        assert dispatch.resolve("quantize", "cpu", "reference").backend == "reference"
    assert qk.current_backend() == before


def test_a_composed_operator_ends_with_the_block():
    op = "pack_int4"
    with qk.use_backend("cpu") if native.is_available() else qk.use_backend("auto"):
        kernel = dispatch.resolve(op, "cpu", qk.current_backend()).kernel
        with qk.use_composed(op):
            inside = dispatch.resolve(op, "cpu", qk.current_backend()).kernel
            with qk.use_composed():
                assert dispatch.resolve(op, "cpu", qk.current_backend()).kernel is kernel
        assert dispatch.resolve(op, "cpu", qk.current_backend()).kernel is kernel
    assert not native.is_available() or inside is COMPOSITES[op] is not kernel


def test_what_cannot_be_composed_is_an_error():
    with pytest.raises(qk.InvalidArgument, match=r"ops: quantize cannot be composed; choose of"):
        qk.use_composed("quantize", "qat_matmul")
    assert dispatch._as_composed == frozenset()


def test_unknown_backend():
    with pytest.raises(qk.InvalidArgument, match="backend"):
        qk.use_backend("tpu")


def test_missing_library_is_an_error_when_named(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "no compiler was found")
    with pytest.raises(qk.BackendUnavailable, match="no compiler was found"):
        qk.use_backend("cpu")


def test_a_backend_of_another_device_is_an_error():
    with pytest.raises(qk.BackendUnavailable, match="cuda"):
        dispatch.resolve("quantize", "cpu", "cuda")


def test_triton_needs_the_interpreter_for_cpu_tensors(monkeypatch):
    monkeypatch.setattr(triton, "devices", lambda: ("cuda",))
    dispatch._resolved.cache_clear()
    with pytest.raises(qk.BackendUnavailable, match="'triton' cannot run quantize on cpu"):
        dispatch.resolve("quantize", "cpu", "triton")
    dispatch._resolved.cache_clear()


def test_triton_that_is_not_installed_is_an_error_when_named(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda: "triton is not installed: pip install triton")
    with pytest.raises(qk.BackendUnavailable, match="pip install triton"):
        qk.use_backend("triton")


def test_auto_never_interprets_on_cuda(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda: "")
    monkeypatch.setattr(triton, "devices", lambda: ("cpu",))
    dispatch._resolved.cache_clear()
    assert dispatch.resolve("silu_mul", "cuda", "auto").backend == "reference"
    dispatch._resolved.cache_clear()


def test_auto_prefers_triton_on_cuda(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda: "")
    monkeypatch.setattr(triton, "devices", lambda: ("cuda",))
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    dispatch._resolved.cache_clear()
    choices = {op: dispatch.resolve(op, "cuda", "auto") for op in SCHEMAS}
    dispatch._resolved.cache_clear()
    assert {choice.backend for choice in choices.values()} == {"triton"}
    for op, choice in choices.items():
        if op not in triton.kernels():
            assert choice.kernel is COMPOSITES[op] and "composed" in choice.reason


def test_auto_reads_pages_where_there_is_a_kernel_for_them(monkeypatch):
    if not native.build_info().get("cuda"):
        pytest.skip("built without CUDA")
    monkeypatch.setattr(triton, "why_not", lambda: "")
    monkeypatch.setattr(triton, "devices", lambda: ("cuda",))
    dispatch._resolved.cache_clear()
    chosen = {
        op: dispatch.resolve(op, "cuda", "auto").backend
        for op in ("attention_decode", "attention_decode_paged", "rope_quantize_append_paged")
    }
    dispatch._resolved.cache_clear()
    assert list(chosen.values()) == ["triton", "cuda", "cuda"]


def test_the_reader_of_a_layout_is_its_writer(monkeypatch):
    """Without triton's own kernel `auto` must not hand triton's layout to another backend."""
    monkeypatch.setattr(triton, "why_not", lambda: "")
    monkeypatch.setattr(triton, "devices", lambda: ("cuda",))
    monkeypatch.setattr(native, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_own_kernel", _every_kernel_but_triton_s_readers)
    dispatch._resolved.cache_clear()
    backends = {dispatch.resolve(op, "cuda", "auto").backend for op in dispatch.LAYOUT_READERS}
    assert dispatch.resolve("repack_weight", "cuda", "auto").backend == "triton"
    named = {dispatch.resolve(op, "cuda", "cuda").backend for op in dispatch.LAYOUT_READERS}
    dispatch._resolved.cache_clear()
    assert (backends, named) == ({"triton"}, {"cuda"})


def _every_kernel_but_triton_s_readers(backend, op):
    missing = backend == "triton" and op in ("repacked_matmul_silu_mul", "float_matmul")
    return (None, "none") if missing else (torch.relu, "")


def test_auto_announces_a_fallback_once(monkeypatch, caplog):
    dispatch._resolved.cache_clear()
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "the library is not built")
    monkeypatch.setattr(dispatch, "_announced", set())
    for op in ("quantize", "dequantize"):
        assert dispatch.resolve(op, "cpu", "auto").backend == "reference"
    assert len(caplog.records) == 1 and "not built" in caplog.text
    dispatch._resolved.cache_clear()


def test_reference_ignores_autocast(backend):
    x, w = torch.randn(4, 64), torch.randn(8, 64)
    codes, scale = qk.quantize(w, 4)
    want = qk.quantized_linear(x, codes, scale, w_bits=4, a_bits=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(qk.quantized_linear(x, codes, scale, w_bits=4, a_bits=8), want)
