"""Differential cases: what is compared, that equal is equal, and that a wrong kernel is found."""

import pytest
import torch

from benchmarks import differential, equality
from benchmarks.random_arguments import DRAWS, Draw
from llmqat_kernels.backends import triton
from llmqat_kernels.backends.reference import REFERENCE
from llmqat_kernels.schemas import SCHEMAS

CPU = torch.device("cpu")
interpreter = pytest.mark.skipif(
    "cpu" not in triton.devices() or bool(triton.why_not()),
    reason="needs Triton's interpreter",
)
FLOAT_OPS = {
    "qat_matmul_backward_input",
    "qat_matmul_backward_weight",
    "repacked_linear",
    "repacked_linear_add",
    "float_matmul",
    "rms_norm_backward",
    "silu_mul_backward",
    "attention_decode",
    "attention_decode_paged",
    "attention_decode_quantize",
    "distillation_loss",
    "distillation_loss_logits",
    "distillation_loss_top_k",
}
PARTS = {
    "pack_int4", "unpack_int4", "repack_weight", "rope_quantize_append_paged",
    "rope_quantize_append_queries",
}  # fmt: skip


def test_every_exact_operator_is_drawn():
    assert set(DRAWS) == set(SCHEMAS) - FLOAT_OPS - PARTS


@pytest.mark.parametrize("op", list(DRAWS))
def test_arguments_fit_the_specification_and_repeat(op):
    shapes = set()
    for seed in range(12):
        args = DRAWS[op](Draw(seed, wide=True))
        assert len(differential.call(op, args, None)) > 0
        again = DRAWS[op](Draw(seed, wide=True))
        for a, b in zip(args, again, strict=True):
            same = torch.equal(a.nan_to_num(), b.nan_to_num()) if torch.is_tensor(a) else a == b
            assert same
        shapes.add(differential.signature(op, args))
    assert len(shapes) > 6


@interpreter
@pytest.mark.triton
def test_fifty_cases_are_equal():
    result = differential.run(50, CPU)
    assert result["cases"] == 50 and result["differences"] == 0, result["failures"]
    assert result["shapes"] > 45 and result["batch_checks"] > 5 and result["elements"] > 1000
    assert sum(result["by_operator"].values()) == 50
    assert set(result["by_operator"]) | set(result["left_out"]) == set(DRAWS)


@interpreter
@pytest.mark.triton
def test_a_wrong_kernel_is_found(monkeypatch):
    right = REFERENCE["quantize"]

    def wrong(*args):
        codes, scale = right(*args)
        return codes, scale * 1.0000001

    monkeypatch.setitem(REFERENCE, "quantize", wrong)
    monkeypatch.setattr(differential, "tested_ops", lambda backend: (["quantize"], {}))
    result = differential.run(20, CPU)
    assert result["differences"] > 0 and "quantize, seed" in result["failures"][0]


def test_differences_count_elements_shapes_and_dtypes():
    x, nan = torch.ones(3), torch.tensor([float("nan"), 1.0, 2.0])
    assert differential.differences((nan,), (nan.clone(),)) == 0
    assert differential.differences((x,), (nan,)) == 2
    assert differential.differences((x,), (x.half(),)) == 1
    assert differential.differences((x,), (x[:2],)) == 1
    assert differential.differences((x,), (x, x)) == 1


@interpreter
@pytest.mark.triton
def test_the_command_prints_and_exits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["equality", "--backend", "triton", "--cases", "20"])
    with pytest.raises(SystemExit) as stop:
        equality.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "20 cases in the interpreter" in out and "0 differences" in out


def test_cases_that_a_backend_refuses_are_counted(monkeypatch):
    """The CPU's kernels stand in for a backend that takes no groups."""
    monkeypatch.setattr(differential, "tested_ops", lambda backend: (["quantize", "rope"], {}))
    ours = differential.call

    def call(op, args, device):
        if op == "rope" and device is not None:
            raise RuntimeError("x: no kernel for this; use backend 'triton'")
        return ours(op, args, device)

    monkeypatch.setattr(differential, "call", call)
    found = differential.run(6, torch.device("cpu"), backend="auto")
    assert found["refused"] == {"rope": 3} and found["by_operator"] == {"quantize": 3}
    assert found["cases"] == 3 and found["differences"] == 0


@pytest.mark.parametrize("argv", [["--backend", "cuda"], ["--device", "cuda"]])
def test_backends_stay_on_their_devices(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        equality.main(argv)
    assert stop.value.code == 2 and "--device cuda" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_the_device_one_line_and_status_1(monkeypatch, capsys):
    argv = ["equality", "--backend", "triton", "--device", "cuda"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        equality.main()
    assert stop.value.code == 1 and "no CUDA device" in capsys.readouterr().err
