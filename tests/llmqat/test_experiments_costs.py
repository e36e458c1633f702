"""Figure 4 from the paper's own figures."""

import json

import pytest

from llmqat.errors import ConfigError
from llmqat.experiments.costs import break_even, cost_lines, row_cost, shape_of
from llmqat.experiments.tables import load_tables

LLAMA_7B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
ASSUMPTIONS = load_tables()["figure4"].assumptions


def test_published_days_follow_from_the_assumed_speedups():
    full, ptq, qat = cost_lines(ASSUMPTIONS)
    count = ASSUMPTIONS["inferences"]
    assert full.days(count) == 4280
    for line in (ptq, qat):
        assert line.days_per_inference * count == pytest.approx(line.published, abs=1)
    assert qat.days(count) == pytest.approx(586.3 + 55.2, abs=0.1)


def test_break_even():
    full, ptq, qat = cost_lines(ASSUMPTIONS)
    crossing = break_even(qat, full)
    assert qat.days(crossing) == pytest.approx(full.days(crossing))
    assert break_even(full, ptq) is None


def test_measured_speeds_are_their_own_lines():
    lines = cost_lines(ASSUMPTIONS, {"16-16-16": 20.0, "4-8-8": 110.0})
    assert [line.label for line in lines][-1] == "LLM-QAT, measured"
    assert lines[-1].days_per_inference == pytest.approx(lines[0].days_per_inference / 5.5)
    assert len(cost_lines(ASSUMPTIONS, {"16-16-16": 20.0, "4-8-8": 110.0, "8-8-8": 60.0})) == 5


@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        ({"4-8-8": 0.0}, "4-8-8=0.0 is not a positive number"),
        ({"4-8-8": float("nan")}, "4-8-8=nan is not a positive number"),
        ({"16-16-16": float("inf"), "4-8-8": 1.0}, "16-16-16=inf is not a positive number"),
        ({"4-8-8": 110.0}, "16-16-16 is missing"),
        ({"9-9-9": 110.0, "16-16-16": 3.0}, "no line of '9-9-9'; use 16-16-16, 8-8-8, 4-8-8"),
        ({"16-16-16": 3.0}, "16-16-16 alone compares nothing; add 8-8-8 or 4-8-8"),
    ],
)
def test_speeds_without_a_line(speeds, message):
    with pytest.raises(ConfigError, match=message):
        cost_lines(ASSUMPTIONS, speeds)


def test_costs_of_a_row(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    shape = shape_of(tmp_path)
    cost = row_cost(shape, "4-8-16", None)
    assert cost["weights_gib"] == pytest.approx(3.5, abs=0.05)
    assert cost["kv_gib"] == 1.0
    assert cost["ops"] == pytest.approx(1.326e13 * 32, rel=1e-3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    assert shape_of(tmp_path) is None
