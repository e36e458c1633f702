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


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.foo=3", "train.foo is not an option of llmqat train; see its --help"),
        ("train.step=3", "train.step is not an option of llmqat train; did you mean train.steps?"),
        ("generate.steps=3", "generate.steps is not an option of llmqat generate-data"),
        ("train.steps=abc", "train.steps: expected a whole number, got 'abc'"),
        ("train.steps=1.5", "train.steps: expected a whole number, got float"),
        ("train.fused=3", "train.fused: expected true or false, got int"),
        ("train.lr=[1]", "train.lr: expected a number, got list"),
        ("train.lr=[", "'train.lr=[': the value is not valid YAML"),
        ("train.dtype=true", "train.dtype: expected text, got bool"),
        ("train.help=true", "train.help is not an option"),
        ("trian.steps=3", "trian is not a section of a budget"),
        ("train.model=x", "train.model is given by the experiment itself"),
        ("train.data=x", "train.data is given by the experiment itself"),
        ("train.teacher=x", "train.teacher is given by the experiment itself"),
        ("gptq.output=x", "gptq.output is given by the experiment itself"),
        ("evaluate.text=x", "evaluate.text is given by the experiment itself"),
    ],
)
def test_an_override_that_the_command_would_refuse(word, says):
    with pytest.raises(ConfigError) as caught:
        parse_overrides([word])
    assert str(caught.value).startswith(f"--set: {says}")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.steps=null", None),
        ("train.epochs=2", 2.0),
        ("train.loss-layers=0", 0),  # a word of the command line in the end
        ("tasks.tasks_dir=samples", "samples"),
        ("tasks.tasks=boolq", ["boolq"]),
        ("gptq.act_order=false", False),
        ("awq.group_size=128", 128),
    ],
)
def test_an_override_that_the_command_takes(word, value):
    ((changed,),) = (section.values() for section in parse_overrides([word]).values())
    assert changed == value and type(changed) is type(value)


def test_every_option_of_a_budget_is_one_of_its_command():
    for budget in load_budgets().values():
        for section, options in budget.sections.items():
            words = [f"{section}.{name}={value}" for name, value in options.items()]
            assert parse_overrides(words) == ({section: dict(options)} if options else {})


def test_wrong_names():
    with pytest.raises(ConfigError, match="'huge' is not a budget"):
        find_budget("huge")
    with pytest.raises(ConfigError, match="trian: is not a section"):
        find_budget("smoke").override({"trian": {}})
    with pytest.raises(ConfigError, match="unknown key 'stpes'"):
        parse_budget("mine", {"metrics": ["tasks"], "stpes": 1})
    with pytest.raises(ConfigError, match="metrics must be"):
        parse_budget("mine", {"metrics": ["speed"]})
