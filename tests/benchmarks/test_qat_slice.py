"""The training step's benchmark at tiny sizes: what is saved, the gate, the table, the file."""

import json

import pytest
import torch
from torch import nn

from benchmarks import gpu_figures, qat_models, qat_slice, report, timing
from benchmarks.eager import PaperFakeQuantize
from benchmarks.qat_models import MODELS, saved_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    failed, kept = {}, []
    result = qat_slice.measure(
        "tiny", CPU, 1, float("inf"), failed, lambda known: kept.append(set(known))
    )
    assert not failed
    assert kept[0] == {"sizes", "loss", "checkpointing"} and kept[1] == kept[0] | {
        "no checkpointing"
    }
    return result


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
    found = qat_slice.count_saved("tiny", CPU, None, {})["saved_bytes"]
    measured = dict(tiny["no checkpointing"]["saved_bytes"])
    same_forward = measured.pop(qat_models.COMPOSED_GRADIENTS)
    assert found == measured and same_forward == found[qat_models.FUSED]


def test_the_eager_model_quantizes_linears_keys_and_values():
    model = qat_models.make_eager(MODELS["tiny"].build(CPU, 0), PaperFakeQuantize)
    kinds = {
        name.rsplit(".", 1)[-1]: module.out_bits
        for name, module in model.named_modules()
        if isinstance(module, qat_models.EagerLinear)
    }
    assert kinds.pop("k_proj") == kinds.pop("v_proj") == 4
    assert len(kinds) == 5 and set(kinds.values()) == {0}
    assert type(model.lm_head) is nn.Linear


def test_the_gate_names_a_step_that_computes_something_else():
    assert qat_slice.gate({"plain": 9.0, "eager": 1.0, "llmqat": 1.04}) == {}
    wrong = qat_slice.gate({"plain": float("nan"), "eager": 1.0, "llmqat": 2.0})
    assert wrong == {"plain": "gate: loss nan", "llmqat": "gate: loss 2.0, eager 1.0"}
    assert set(qat_slice.gate({"plain": 9.0, "llmqat": 1.0})) == {"llmqat"}  # nothing to compare


@pytest.fixture
def saved_here(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def break_candidate(monkeypatch, name):
    """A candidate whose making raises."""
    real = qat_slice.candidates()

    def broken(model):
        raise RuntimeError("CUDA out of memory\nmore")

    every = real | {name: qat_models.Candidate(broken)}
    monkeypatch.setattr(qat_slice, "candidates", lambda: every)


def test_a_candidate_that_raises_is_named_and_the_others_are_timed(monkeypatch, saved_here, capsys):
    break_candidate(monkeypatch, "llmqat fused")
    assert qat_slice.main(["--model", "tiny", "--rounds", "1", "--save"]) == 1
    assert "tiny, llmqat fused: failed: RuntimeError: CUDA out of memory" in capsys.readouterr().err
    step = json.loads((saved_here / "qat_slice_cpu.json").read_text())
    assert step["failed"] == {"tiny, llmqat fused": "RuntimeError: CUDA out of memory"}
    ratios = step["models"]["tiny"]["checkpointing"]["ratios"]
    other = qat_models.COMPOSED_GRADIENTS
    assert set(ratios) == {"llmqat", other}
    losses = set(step["models"]["tiny"]["loss"])
    assert losses == {"plain", "eager", "eager, lean", "llmqat", other}


@pytest.mark.parametrize("name", ["plain", "eager", "llmqat"])
def test_the_report_reads_what_a_failure_leaves(monkeypatch, saved_here, capsys, name):
    break_candidate(monkeypatch, name)
    assert qat_slice.main(["--model", "tiny", "--rounds", "1", "--save"]) == 1
    assert qat_slice.main(["--model", "tiny", "--saved-only", "--save"]) == 1
    step = saved_here / "qat_slice_cpu.json"
    if step.exists():
        step.rename(saved_here / "qat_slice_cuda.json")
    text = gpu_figures.table(saved_here, report.read_result)
    lines = [line for line in text.splitlines() if "QAT step" in line]
    assert len(lines) == 2
    assert all(("not yet measured" in line) == (name != "llmqat") for line in lines)
    saved = [line for line in text.splitlines() if "Saved activations" in line]
    assert all(("not yet measured" in line) == (name != "eager") for line in saved)


def test_a_model_that_raises_leaves_the_others(monkeypatch, saved_here, capsys):
    real = MODELS["tiny"]
    broken = qat_slice.replace(real, heads=3)  # no divisor of the width
    monkeypatch.setattr(qat_slice, "MODELS", {"bad": broken, "tiny": real})
    assert qat_slice.main(["--model", "bad", "tiny", "--rounds", "1", "--save"]) == 1
    step = json.loads((saved_here / "qat_slice_cpu.json").read_text())
    assert set(step["models"]) == {"tiny"} and set(step["failed"]) == {"bad"}


def test_a_run_that_is_ended_keeps_what_it_measured(monkeypatch, saved_here):
    real = qat_slice.measure_mode

    def ended(name, steps, on, *args):
        if not on:
            raise KeyboardInterrupt
        return real(name, steps, on, *args)

    monkeypatch.setattr(qat_slice, "measure_mode", ended)
    with pytest.raises(KeyboardInterrupt):
        qat_slice.main(["--model", "tiny", "--rounds", "1", "--save"])
    step = json.loads((saved_here / "qat_slice_cpu.json").read_text())
    assert "ratios" in step["models"]["tiny"]["checkpointing"]
    assert "no checkpointing" not in step["models"]["tiny"]


def test_a_budget_leaves_out_the_steps_without_checkpointing(capsys):
    found = qat_slice.measure("tiny", CPU, 1, 0.0, {}, lambda known: None)
    assert found["left_out"] == "no checkpointing: --budget" and "checkpointing" in found


def test_the_command_prints_and_saves(saved_here, capsys):
    assert qat_slice.main(["--model", "tiny", "--rounds", "1", "--save"]) == 0
    assert qat_slice.main(["--model", "tiny", "--saved-only", "--tokens", "16", "--save"]) == 0
    out = capsys.readouterr().out
    assert "saved over plain" in out and "| on | plain |" in out
    step = json.loads((saved_here / "qat_slice_cpu.json").read_text())
    saved = json.loads((saved_here / "saved_activations.json").read_text())
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
