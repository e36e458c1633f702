"""The sweep of products: sizes and floors, gates that catch a wrong product, the command."""

import csv

import pytest
import torch

from benchmarks import cells, gemm
from benchmarks.gemm import Inputs, Layer, Weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made():
    layer = gemm.layers_of("tiny")[2]
    weights = Weights(layer, CPU, ("cpu",))
    return weights, Inputs(layer, 40, CPU)


def test_the_four_fused_shapes():
    assert [(layer.n, layer.k) for layer in gemm.layers_of("llama-7b")] == [
        (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008),
    ]  # fmt: skip
    assert [(layer.n, layer.k) for layer in gemm.layers_of("llama-30b")][3] == (6656, 17920)


def test_floors():
    layer = Layer("x", "o", 4096, 4096)
    assert layer.cost(1, 4, 8).bytes == 4096 * 2048 + 4 * 4096 + 4096 + 4 + 2 * 4096
    assert layer.cost(1, 16, 16).bytes == 2 * 4096 * 4096 + 2 * 4096 + 2 * 4096
    assert layer.cost(3, 4, 8).int_ops == 6 * 4096**2 and layer.cost(3, 4, 16).flops == 6 * 4096**2
    assert layer.cost(3, 4, 16, integer=True).int_ops == 6 * 4096**2


def test_the_plan_begins_with_few_tokens_of_7b():
    found = gemm.plan(gemm.MODELS, gemm.FIRST, gemm.FEW, gemm.MANY)
    assert [(layer.name, m) for layer, m in found[:8]] == [
        (name, m) for m in (1, 16) for name in gemm.LAYERS
    ]
    assert len(found) == len(set(found)) == 3 * 4 * 13
    assert {layer.model for layer, _ in found[: 4 * 13]} == {"llama-7b"}
    assert max(m for _, m in found[: 4 * 7]) == 64


def test_every_form_passes_its_gate(made):
    found = gemm.ours(made[0], made[1], "cpu") | gemm.baselines(*made)
    ready, notes = cells.prepare(found, CPU)
    assert all("not installed" in note for note in notes.values()), notes
    ours = {f"cpu {form}" for form in ("W4A8", "W4A8 + quantize", "W8A8", "W4A4 groups", "W4A16")}
    assert set(ready) >= ours | {"cpu W4A8 SwiGLU", gemm.CUBLAS, gemm.INT_MM, gemm.TINYGEMM}


@pytest.mark.parametrize("form", ["W4A8", "W4A4 groups", "W4A16", "W4A8 SwiGLU"])
def test_a_gate_catches_one_wrong_row(made, form):
    """The last row of the last tile, by one bit of an integer form and more of a float one."""
    candidate = gemm.ours(*made, "cpu")[f"cpu {form}"]
    (call,) = candidate.make(1)

    def off():
        y = call().clone()
        y[-1, -1] += y[-1].abs().max()
        return y

    with pytest.raises(AssertionError):
        candidate.gate(off)


def test_a_gate_catches_a_result_that_changes(made):
    candidate = gemm.ours(*made, "cpu")["cpu W8A8"]
    (call,) = candidate.make(1)
    count = []

    def drifting():
        count.append(0)
        return call() * (1 + (len(count) == 2))

    with pytest.raises(AssertionError, match="a second run"):
        candidate.gate(drifting)


def test_a_baseline_that_computes_something_else_fails(made):
    candidate = gemm.baselines(*made)[gemm.TINYGEMM]
    (call,) = candidate.make(1)
    with pytest.raises(AssertionError, match="differs"):
        candidate.gate(lambda: call().flip(-1))


def test_the_command_records_every_candidate(tiny_machine, tmp_path, capsys):
    argv = ["--quick", "--rounds", "1", "--save", "--results", str(tmp_path)]
    assert gemm.main([*argv, "--skip", "reference"]) == 0
    assert "8 cells, 0 failed gates" in capsys.readouterr().out
    with (tmp_path / "gemm_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {cells.parse_cell(row["cell"])["layer"] for row in rows} == set(gemm.LAYERS)
    assert any(row["candidate"] == "cpu W4A8" and row["gate"] == "passed" for row in rows)
    assert any(row["gate"].startswith("left out: not installed") for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_the_device_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as stop:
        gemm.main(["--device", "cuda"])
    assert stop.value.code == 1 and "no CUDA device" in capsys.readouterr().err
