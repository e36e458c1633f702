"""The training step's benchmark at tiny sizes: what is saved, the gate, the table, the file."""

import json

import pytest
import torch
from torch import nn

from benchmarks import qat_slice, timing
from benchmarks.qat_slice import MODELS, saved_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return qat_slice.measure("tiny", CPU, rounds=1, deadline=float("inf"))


def test_every_candidate_is_measured_with_and_without_checkpointing(tiny):
    assert set(tiny["loss"]) == set(qat_slice.candidates())
    for label in ("no checkpointing", "checkpointing"):
        found = tiny[label]
        assert set(found["seconds"]) == set(found["saved_bytes"]) == set(tiny["loss"])
        for ours, ratios in found["ratios"].items():
            assert ours.startswith("llmqat") and all(value > 0 for value in ratios.values())
    assert "peak_bytes" not in tiny["no checkpointing"]


def test_checkpointing_keeps_less(tiny):
    kept = {
        label: tiny[label]["saved_bytes"]["plain"]["activations"]
        for label in ("no checkpointing", "checkpointing")
    }
    assert kept["checkpointing"] < kept["no checkpointing"] / 3


def test_ours_keeps_fewer_bytes_than_eager(tiny):
    saved = tiny["no checkpointing"]["saved_bytes"]
    ours = [key for key in saved if key.startswith("llmqat")][-1]
    assert saved[ours]["activations"] < saved["eager"]["activations"]
    assert saved[ours]["weight_codes"] > 0 and saved["plain"]["weight_codes"] == 0


def test_saved_bytes_by_hand():
    """Two linears without bias: x and the product between them, once each; no parameter."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(3, 8)
    found = saved_bytes(model, lambda: model(x))
    assert found == {"activations": 3 * 8 * 4 + 3 * 16 * 4, "weight_codes": 0}


def test_a_shared_storage_counts_once():
    model, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
    found = saved_bytes(model, lambda: model(x) + model(x[:2]).sum())
    assert found["activations"] == x.untyped_storage().nbytes()


def test_counting_alone_gives_the_same_bytes(tiny):
    found = qat_slice.count_saved("tiny", CPU, None)
    assert found["saved_bytes"] == tiny["no checkpointing"]["saved_bytes"]
    assert found["saved_over_plain"]["plain"] == 1.0


def test_the_eager_model_quantizes_linears_keys_and_values():
    model = qat_slice.make_eager(MODELS["tiny"].build(CPU, 0))
    kinds = {
        name.rsplit(".", 1)[-1]: module.out_bits
        for name, module in model.named_modules()
        if isinstance(module, qat_slice.EagerLinear)
    }
    assert kinds.pop("k_proj") == kinds.pop("v_proj") == 4
    assert len(kinds) == 5 and set(kinds.values()) == {0}
    assert type(model.lm_head) is nn.Linear


def test_the_gate_stops_a_step_that_computes_something_else():
    class Fixed:
        def __init__(self, loss):
            self.run = lambda: torch.tensor(loss)

    with pytest.raises(SystemExit, match="llmqat has loss"):
        qat_slice.gate({"plain": Fixed(9.0), "eager": Fixed(1.0), "llmqat": Fixed(2.0)})
    with pytest.raises(SystemExit, match="plain has loss nan"):
        qat_slice.gate({"plain": Fixed(float("nan")), "eager": Fixed(1.0)})


def test_the_command_prints_and_saves(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    qat_slice.main(["--model", "tiny", "--rounds", "1", "--save"])
    qat_slice.main(["--model", "tiny", "--saved-only", "--tokens", "16", "--save"])
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "saved over plain" in out and "| on | plain |" in out
    step = json.loads((tmp_path / "qat_slice_cpu.json").read_text())
    saved = json.loads((tmp_path / "saved_activations.json").read_text())
    assert set(step["models"]) == {"tiny"} and step["environment"]["torch"] == torch.__version__
    assert saved["models"]["tiny"]["sizes"]["tokens"] == 16


@pytest.mark.parametrize("argv", [["--rounds", "0"], ["--tokens", "8"], ["--model", "huge"]])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        qat_slice.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_the_device_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as stop:
        qat_slice.main(["--device", "cuda"])
    assert stop.value.code == 1 and "no CUDA device" in capsys.readouterr().err
