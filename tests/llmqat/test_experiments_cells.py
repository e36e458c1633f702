"""From rows to chains of commands; nothing runs here."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from llmqat.cli import parse_arguments
from llmqat.errors import ConfigError
from llmqat.experiments.budgets import find_budget
from llmqat.experiments.cells import by_need, chain, expand, measured
from llmqat.experiments.inputs import Inputs
from llmqat.experiments.options import check_values
from llmqat.experiments.stages import Source, Stage, Store, in_order
from llmqat.experiments.tables import load_tables

MODEL = Source(Path("/models/m"), "m0")
INPUTS = Inputs(
    name="m",
    model=MODEL,
    generator=MODEL,
    texts={"wikitext2": Source(Path("/t/wiki.txt"), "w0"), "c4": Source(Path("/t/c4.txt"), "c0")},
    train_texts={n: Source(Path(f"/t/{n}"), n) for n in ("wikitext2", "wikitext103", "c4")},
)
LAPTOP = find_budget("laptop")
HASHES = {
    "16-16-16-full": "699e1bfea537ab5e",
    "4-8-16-llm-qat": "bd7fce30570613a3",
    "table8": "d1a385d8a36c66fa",
}


def row(table, key):
    return next(r for r in load_tables()[table].rows if r.key == key)


def cell(table, key, seed=0, kv_mode=None, budget=LAPTOP, inputs=INPUTS):
    return chain(row(table, key), ["perplexity/wikitext2"], budget, inputs, seed, kv_mode)[
        "perplexity/wikitext2"
    ]


def commands(stage):
    return [s.command for s in in_order([stage])]


def test_chains_of_the_methods():
    assert commands(cell("table2", "16-16-16-full")) == ["eval"]
    assert commands(cell("table2", "4-8-4-rtn", kv_mode="paper")) == ["eval"]
    smooth = ["generate-data", "quantize", "eval"]
    assert commands(cell("table2", "4-8-16-smoothquant")) == smooth
    assert commands(cell("table2", "4-16-16-gptq")) == smooth
    assert commands(cell("table2", "4-8-16-llm-qat")) == ["generate-data", "train", "eval"]
    assert commands(cell("table8", "4-4-16-llm-qat-smooth")) == [
        "generate-data", "quantize", "train", "eval",
    ]  # fmt: skip
    assert commands(cell("table3", "c4")) == ["train", "eval"]


def test_the_same_work_is_one_stage_in_all_tables():
    common = cell("table2", "4-6-16-llm-qat")
    assert cell("table1", "4-6-16-llm-qat").hash == common.hash
    assert cell("table3", "hybrid").hash == common.hash
    assert cell("table5", "logits").hash == common.hash
    assert cell("table4", "sym-sym").hash == cell("table2", "4-8-16-llm-qat").hash
    assert cell("table3", "greedy").hash != common.hash
    smooth = [in_order([cell("table2", f"{b}-smoothquant")])[1] for b in ("4-8-16", "8-8-16")]
    assert smooth[0].hash == smooth[1].hash


def test_hashes_cover_what_is_read_and_not_where_it_lies():
    first = cell("table2", "4-8-16-llm-qat")
    moved = replace(INPUTS, model=Source(Path("/elsewhere"), "m0"), generator=MODEL)
    assert cell("table2", "4-8-16-llm-qat", inputs=moved).hash == first.hash
    other = Source(Path("/models/m"), "m1")
    changed = replace(INPUTS, model=other, generator=other)
    assert cell("table2", "4-8-16-llm-qat", inputs=changed).hash != first.hash
    longer = LAPTOP.override({"train": {"steps": 65}})
    assert cell("table2", "4-8-16-llm-qat", budget=longer).hash != first.hash
    speed = LAPTOP.override({"generate": {"slots": 3}, "train": {"save_steps": 7}})
    assert cell("table2", "4-8-16-llm-qat", budget=speed).hash == first.hash
    assert cell("table2", "4-8-16-llm-qat", seed=1).hash != first.hash
    launched = replace(INPUTS, launch=("accelerate", "launch"))
    assert cell("table2", "4-8-16-llm-qat", inputs=launched).hash != first.hash


def test_stages_of_earlier_runs_are_found_again():
    """Their hashes name folders on the disk: a change makes everything run again."""
    hashes = {key: cell("table2", key).hash for key in ("16-16-16-full", "4-8-16-llm-qat")}
    hashes["table8"] = cell("table8", "4-4-16-llm-qat-4ch-token").hash
    assert hashes == HASHES


def test_a_cell_says_what_it_reads():
    def inputs(key, table="table2", **options):
        return next(
            c.inputs for c in expand([load_tables()[table]], LAPTOP, given, **options)
            if c.row.key == key
        )  # fmt: skip

    given = replace(INPUTS, generator=Source(Path("/g"), "g0"))
    texts = {"text c4": "c0", "text wikitext2": "w0"}
    assert inputs("16-16-16-full") == texts
    assert inputs("4-8-16-rtn") == texts
    assert inputs("4-16-16-gptq") == {**texts, "generator": "g0"}
    assert inputs("4-8-16-llm-qat") == {**texts, "generator": "g0"}
    assert inputs("c4", "table3") == {**texts, "train text c4": "c4"}
    given = replace(given, texts={}, tasks_dir=Source(Path("/tasks"), "t0"))
    full = find_budget("full")
    cells = expand([load_tables()["table1"]], full, given, only="4-8-16-rtn")
    assert [c.inputs for c in cells] == [{"tasks": "t0"}]


def test_every_command_parses_at_every_budget(tmp_path):
    for name in ("smoke", "laptop", "full"):
        cells = expand(list(load_tables().values()), find_budget(name), INPUTS, seeds=(0, 1))
        stages = in_order(stage for c in cells for stage in c.columns.values())
        seen = set()
        for stage in stages:
            module = import_module(f"llmqat.commands.{stage.command.replace('-', '_')}")
            words = Store(tmp_path).argv(stage)
            # Stages that differ in values only would parse alike: one of each form is enough.
            form = (stage.command, tuple(k for k, _ in stage.options), stage.name)
            if form in seen:
                continue
            seen.add(form)
            check_values(stage)
            parsed = parse_arguments(stage.command, module.ARGUMENTS, words[1:])
            if hasattr(parsed[-1], "to_config"):
                parsed[-1].to_config()


def test_a_row_without_randomness_has_one_cell():
    cells = expand([load_tables()["table2"]], LAPTOP, INPUTS, seeds=(0, 1, 2), kv_modes=("paper",))
    count = {method: 0 for method in ("full", "rtn", "smoothquant", "gptq", "llm-qat")}
    for c in cells:
        count[c.row.method] += 1
    assert count == {"full": 1, "rtn": 8, "smoothquant": 21, "gptq": 3, "llm-qat": 24}


def test_kv_modes_are_cells_of_rows_with_a_quantized_cache():
    cells = expand([load_tables()["table2"]], LAPTOP, INPUTS)
    assert len(cells) == 31
    assert len(expand([load_tables()["table2"]], LAPTOP, INPUTS, kv_modes=("serving",))) == 25
    names = [c.name for c in cells]
    assert "table2/4-8-4-rtn@serving#0" in names and "table2/4-8-16-rtn#0" in names


def test_only_takes_a_pattern():
    cells = expand([load_tables()["table2"]], LAPTOP, INPUTS, only="4-8-4-*@paper")
    assert [c.row.method for c in cells] == ["rtn", "smoothquant", "llm-qat"]
    with pytest.raises(ConfigError, match="no cell's name contains '5-5-5'"):
        expand([load_tables()["table2"]], LAPTOP, INPUTS, only="5-5-5")


def test_a_missing_training_text_is_one_failed_cell():
    inputs = replace(INPUTS, train_texts={}, missing={"c4": "--train-text c4=FILE is not given"})
    cells = expand([load_tables()["table3"]], LAPTOP, inputs)
    failed = {c.row.key: c.error for c in cells if c.error}
    assert set(failed) == {"wikitext2", "wikitext103", "c4"}
    assert "--train-text c4=FILE" in failed["c4"]


def test_a_text_that_is_not_there_is_no_column():
    inputs = replace(INPUTS, texts={"wikitext2": INPUTS.texts["wikitext2"]})
    cells = expand([load_tables()["table2"]], LAPTOP, inputs)
    assert {tuple(c.columns) for c in cells} == {("perplexity/wikitext2",)}


def test_columns_by_budget():
    tables = load_tables()
    assert measured(tables["table2"], LAPTOP) == ("perplexity/c4", "perplexity/wikitext2")
    assert measured(tables["table1"], LAPTOP) == ("perplexity/wikitext2",)
    assert measured(tables["table6"], find_budget("full")) == ("mmlu", "triviaqa")


def test_cheap_cells_come_first():
    cells = by_need(expand([load_tables()["table2"]], LAPTOP, INPUTS))
    methods = [c.row.method for c in cells]
    assert methods[:9].count("llm-qat") == 0 and set(methods[-10:]) == {"llm-qat"}


def test_a_row_may_change_the_budget():
    changed = replace(row("table2", "4-8-16-llm-qat"), options={"train": {"lr": 1e-5}})
    stage = chain(changed, ["perplexity/wikitext2"], LAPTOP, INPUTS, 0, None)
    train = next(s for s in in_order(stage.values()) if s.command == "train")
    assert dict(train.options)["lr"] == 1e-5
    assert isinstance(dict(train.options)["data"], Stage)


@pytest.mark.parametrize("count", ["num_records", "num_tokens"])
def test_a_row_may_learn_from_more_text_than_the_budget_gives(count):
    """The model is smoothed on the budget's own text, which other rows have already."""
    budget = LAPTOP.override({"generate": {"num_records": None, count: 10}})
    stages = in_order([cell("beyond", "llm-qat-keys-text", budget=budget)])
    options = [dict(stage.options) for stage in stages if stage.command == "generate-data"]
    assert [o[count] for o in options] == [10, 15]
