"""Budgets and their overrides."""

import pytest

from llmqat.errors import ConfigError
from llmqat.experiments.budgets import find_budget, load_budgets, parse_budget, parse_overrides


def test_the_full_budget_is_the_papers():
    full = find_budget("full")
    assert full.options("generate")["num_records"] == 100_000
    assert full.options("generate")["max_len"] == 2048
    train = full.options("train")
    assert (train["lr"], train["seq_len"], train["epochs"]) == (2e-5, 2048, 1.0)
    assert train["batch_size"] * train["grad_accum"] == 8


def test_laptop_measures_perplexity_only():
    assert {name: budget.metrics for name, budget in load_budgets().items()} == {
        "smoke": ("perplexity", "tasks"),
        "laptop": ("perplexity",),
        "full": ("perplexity", "tasks"),
    }


def test_overrides_are_yaml_values():
    changes = parse_overrides(["train.steps=256", "train.lr=1e-4", "train.fused=true"])
    assert changes == {"train": {"steps": 256, "lr": 1e-4, "fused": True}}
    budget = find_budget("laptop").override(changes)
    assert budget.options("train")["steps"] == 256
    assert find_budget("laptop").options("train")["steps"] != 256
    nothing = budget.override({"train": {"fused": False, "steps": None}}).options("train")
    assert "fused" not in nothing and "steps" not in nothing


@pytest.mark.parametrize("word", ["steps=3", "train.steps", ".x=1", "train.=1"])
def test_an_override_of_another_form(word):
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides([word])


def test_wrong_names():
    with pytest.raises(ConfigError, match="'huge' is not a budget"):
        find_budget("huge")
    with pytest.raises(ConfigError, match="trian: is not a section"):
        find_budget("smoke").override({"trian": {}})
    with pytest.raises(ConfigError, match="unknown key 'stpes'"):
        parse_budget("mine", {"metrics": ["tasks"], "stpes": 1})
    with pytest.raises(ConfigError, match="metrics must be"):
        parse_budget("mine", {"metrics": ["speed"]})
