"""Decoding a model with random weights: the gate, the candidates, what is stored."""

import functools
import json

import pytest
import torch

from benchmarks import decode_7b, decode_rates, timing
from benchmarks import turns as turns_module
from benchmarks.decode_7b import COMPILED, EAGER, INT4, OURS, Bench
from llmqat_kernels import use_backend
from llmqat_kernels.dispatch import current_backend

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


def test_the_cuda_kernels_are_a_candidate_on_a_gpu(monkeypatch):
    """The same engine on another backend, gated and timed under it."""
    bench, seen = Bench("tiny", CPU, 24, 6), []
    assert not any(decode_7b.OURS_CUDA in group for group in bench.decoding(1))
    monkeypatch.setattr(bench, "device", torch.device("cuda"))
    assert all(list(bench.decoding(n)[1]) == [decode_7b.OURS_CUDA] for n in (1, 2))
    for name in ("gate", "engine_steps", "engine_generate"):  # what runs on a device only
        monkeypatch.setattr(decode_7b, name, lambda *_: lambda: seen.append(current_backend()))
    monkeypatch.setattr(bench, "engine", lambda *_: seen.append(current_backend()))
    with use_backend("cpu"):
        for batch in (1, 2):
            bench.cuda_first(batch)()
    assert seen == ["cuda"] * 4


def test_ratios_of_both_backends():
    rates = {OURS: [6.0], decode_7b.OURS_CUDA: [8.0], EAGER: [2.0]}
    found = decode_7b.decode_result(Bench("tiny", CPU, 24, 6), 1, rates, {}, 1e9)
    assert found["ratios"] == {EAGER: 3.0} and found["ratios_of_cuda"] == {EAGER: 4.0}
    assert found["share_of_bound_cuda"] == pytest.approx(found["share_of_bound"] * 8 / 6)


def test_what_is_skipped_is_not_drawn(tiny_machine):
    bench = Bench("tiny", CPU, 24, 6)
    found = bench.prefill(1, float("inf"), ("transformers",))
    assert set(found["tokens_per_second"]) == {OURS} and bench._float is None


def test_one_candidate_that_cannot_run_does_not_stop_the_others():
    def broken():
        raise RuntimeError("no such kernel")

    turns = turns_module.Turns(3, CPU, float("inf"))
    turns.add({"a": lambda: lambda: 2.0, "b": broken})
    rates, notes = turns.rates, turns.notes
    assert rates == {"a": [2.0, 2.0, 2.0]} and notes == {
        "b": "left out: RuntimeError: no such kernel"
    }


def test_past_the_deadline_one_candidate_and_one_round():
    turns = turns_module.Turns(3, CPU, float("-inf"))
    turns.add({"a": lambda: lambda: 2.0, "b": lambda: lambda: 3.0})
    turns.add({"c": lambda: lambda: 4.0})
    assert turns.rates == {"a": [2.0]}
    assert turns.notes == dict.fromkeys("bc", "left out: --budget")


def test_the_first_candidate_takes_turns_with_every_group():
    turns = turns_module.Turns(2, CPU, float("inf"))
    turns.add({"a": lambda: lambda: 2.0, "b": lambda: lambda: 3.0})
    turns.add({"c": lambda: lambda: 4.0})
    assert turns.rates == {"a": [2.0] * 4, "b": [3.0] * 2, "c": [4.0] * 2}


def test_what_does_not_fit_together_is_measured_one_by_one(monkeypatch):
    """Nothing of the others is alive then, the first candidate included; a note says so."""
    alive = set()

    class Candidate:
        def __init__(self, name):
            self.name = name
            alive.add(name)

        def __call__(self):
            assert self.name != "c" or alive == {"c"}
            return 2.0

        def __del__(self):
            alive.discard(self.name)

    monkeypatch.setattr(turns_module, "free_bytes", lambda device: 10.0)
    turns = turns_module.Turns(2, CPU, float("inf"))
    turns.add({name: functools.partial(Candidate, name) for name in "ab"}, needed=9.0)
    assert alive == {"a"} and turns.notes == {}
    turns.add({"c": lambda: Candidate("c")}, needed=9.1)
    assert alive == set() and turns.notes == {"c": turns_module.ALONE}
    turns.add({"d": lambda: Candidate("d")}, needed=1.0)
    assert turns.rates == {name: [2.0, 2.0] for name in "abcd"}


def test_a_candidate_that_fails_later_leaves_the_others():
    rates = iter([1.0, 1.0])
    turns = turns_module.Turns(3, CPU, float("inf"))
    turns.add({"a": lambda: lambda: next(rates), "b": lambda: lambda: 3.0})
    assert turns.rates == {"a": [1.0], "b": [3.0] * 3}
    assert turns.notes == {"a": "stopped in round 2: StopIteration"}
    turns.add({"c": lambda: lambda: 4.0})  # in turns with the first that is left
    assert turns.rates == {"a": [1.0], "b": [3.0] * 6, "c": [4.0] * 3}


def test_a_batch_uses_the_float_model_up_and_decodes_the_same():
    """Beside a large cache there is no room for the linears twice."""
    tokens = {}
    for batch in (1, 2):
        bench = Bench("tiny", CPU, 24, 6)
        model = bench.plain
        for parameter in model.parameters():
            parameter.data *= 6 if parameter.dim() > 1 else 1
        decoder = bench.decoder(batch, int4=False)
        assert (bench._float is None) == (batch > 1)
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        freed = [linear.weight is None for linear in linears if linear is not model.lm_head]
        assert all(freed) if batch > 1 else not any(freed)
        decoder.start([5] * batch, 0)
        tokens[batch] = [decoder.step().tolist()[0] for _ in range(8)]
    assert tokens[1] == tokens[2] and len(set(tokens[1])) > 2


def test_large_batches_fit_what_they_should():
    """A 7B model at batch 64: both engines together on 80 GB, and each on its own everywhere; the
    decoder with its bf16 cache beside one engine on 141 GB only."""
    bench = Bench("llama-7b", CPU, 2048, 128)
    own, compiled = (bench.needed(64, list(group)) for group in bench.decoding(64))
    share = turns_module.MEMORY_SHARE
    first = bench.needed(64, [f"{OURS}, steps"])
    assert own < share * 80e9 and compiled < 83e9
    assert share * (84e9 - first) < compiled < share * (149e9 - first)
    assert bench.needed(1, [OURS, EAGER]) > bench.needed(1, [EAGER]) > bench.needed(2, [COMPILED])


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
