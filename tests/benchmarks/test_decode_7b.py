"""Decoding a model with random weights: the gate, the candidates, what is stored."""

import json

import pytest
import torch

from benchmarks import decode_7b, decode_rates, timing
from benchmarks.decode_7b import COMPILED, EAGER, INT4, OURS, Bench

CPU = torch.device("cpu")


def test_the_command_measures_and_stores_after_every_batch(
    tiny_machine, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    argv = ["--rounds", "1", "--save", "--batch", "1", "2", "--skip", "static"]
    assert decode_7b.main(argv) == 0
    out = capsys.readouterr().out
    assert "Decode, batch 1" in out and "Prefill of 23 tokens" in out and "Bound at" in out
    found = json.loads((tmp_path / "decode_7b_cpu.json").read_text())
    one, two = found["batches"]["1"], found["batches"]["2"]
    assert {OURS, f"{OURS}, steps", EAGER, INT4, COMPILED} <= set(one["tokens_per_second"])
    assert one["ratio_of"] == OURS and set(one["ratios"]) == {EAGER, INT4, COMPILED}
    assert two["ratio_of"] == f"{OURS}, steps" and COMPILED in two["ratios"]
    assert one["notes"] == {} and 0 < one["share_of_bound"]
    assert found["gate"]["KV8"]["logits_error"] <= decode_7b.GATE_TOLERANCE
    assert found["gate"]["KV4"]["equal_tokens"] == 1.0
    assert set(found["prefill"]["tokens_per_second"]) == {OURS, EAGER}


def test_one_candidate_that_cannot_run_does_not_stop_the_others():
    def broken():
        raise RuntimeError("no such kernel")

    turns = decode_7b.Turns(3, CPU, float("inf"))
    turns.add({"a": lambda: lambda: 2.0, "b": broken})
    rates, notes = turns.rates, turns.notes
    assert rates == {"a": [2.0, 2.0, 2.0]} and notes == {
        "b": "left out: RuntimeError: no such kernel"
    }


def test_past_the_deadline_one_candidate_and_one_round():
    turns = decode_7b.Turns(3, CPU, float("-inf"))
    turns.add({"a": lambda: lambda: 2.0, "b": lambda: lambda: 3.0})
    turns.add({"c": lambda: lambda: 4.0})
    assert turns.rates == {"a": [2.0]}
    assert turns.notes == dict.fromkeys("bc", "left out: --budget")


def test_the_first_candidate_takes_turns_with_every_group():
    turns = decode_7b.Turns(2, CPU, float("inf"))
    turns.add({"a": lambda: lambda: 2.0, "b": lambda: lambda: 3.0})
    turns.add({"c": lambda: lambda: 4.0})
    assert turns.rates == {"a": [2.0] * 4, "b": [3.0] * 2, "c": [4.0] * 2}


def test_arrivals_count_from_the_moment_all_have_a_token(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr(decode_rates.time, "perf_counter", lambda: next(clock))
    arrivals = decode_rates.Arrivals(2)
    for record in (0, 1, 0, 1, 0, 1):
        arrivals(record, 7)
    assert arrivals.rate == 2.0  # four tokens in two seconds


def test_generate_counts_the_same_tokens_for_a_batch():
    """A batch has no streamer: two runs of different length."""
    model = Bench("tiny", CPU, 24, 6).plain
    for batch in (1, 2):
        prompts = decode_rates.prompts_of(batch, 4, 256)
        assert decode_rates.transformers_generate(model, prompts, 4)() > 0


def test_the_gate_stops_wrong_logits(monkeypatch):
    monkeypatch.setattr(decode_7b, "GATE_TOLERANCE", -1.0)
    with pytest.raises(AssertionError, match="KV8: logits differ"):
        decode_7b.gate("tiny", CPU)


def test_the_gate_stops_tokens_that_differ(monkeypatch):
    monkeypatch.setattr(decode_7b, "GATE_EQUAL", 1.1)
    with pytest.raises(AssertionError, match="100% of the tokens"):
        decode_7b.gate("tiny", CPU)


def test_a_failed_gate_is_one_line(tiny_machine, monkeypatch, capsys):
    monkeypatch.setattr(decode_7b, "GATE_TOLERANCE", -1.0)
    assert decode_7b.main(["--quick"]) == 1
    assert "gate: KV8" in capsys.readouterr().err
