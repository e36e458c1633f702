"""The tables as data: complete, valid, and what the paper says."""

import copy

import pytest

from llmqat.errors import ConfigError
from llmqat.eval.tasks.catalog import TASKS
from llmqat.eval.tasks.catalog import ZERO_SHOT as CATALOG
from llmqat.experiments.tables import (
    FEW_SHOT,
    ZERO_SHOT,
    find_tables,
    load_tables,
    parse_table,
)

VALUES = {
    "title": "t",
    "source": "s",
    "models": ["LLaMA-7B"],
    "columns": ["average"],
    "rows": [
        {"label": "RTN", "bits": "4-8-4", "method": "rtn", "published": {"LLaMA-7B": [1.5]}},
    ],
}
ODD_MEANS = {("table5", "label+hidden")}
"""Rows whose average is not that of their tasks in the paper itself."""


def test_every_table_and_figure_is_registered():
    names = [f"table{i}" for i in range(1, 9)] + ["figure1", "figure4", "beyond"]
    assert list(load_tables()) == names
    kinds = ["table"] * 8 + ["figure"] * 2 + ["table"]
    assert [t.kind for t in load_tables().values()] == kinds


@pytest.mark.parametrize("name", ["table1", "table2", "table6"])
def test_the_grid_has_eight_settings_and_full_precision(name):
    rows = load_tables()[name].rows
    assert len(rows) == 25
    assert [row.method for row in rows if row.bits == "4-16-16"] == ["rtn", "gptq", "llm-qat"]
    assert {row.bits for row in rows} == {
        "16-16-16", "4-8-4", "4-8-8", "4-6-16", "4-8-16", "4-16-16", "8-8-4", "8-8-8", "8-8-16",
    }  # fmt: skip


def test_published_averages_are_means_of_their_tasks():
    checked = 0
    for table in load_tables().values():
        for row in table.rows:
            for values in row.published.values():
                tasks = [values.get(task) for task in ZERO_SHOT]
                if None in tasks or values.get("average") is None:
                    continue
                checked += 1
                mean = sum(tasks) / len(tasks)
                odd = (table.name, row.key) in ODD_MEANS
                assert (abs(mean - values["average"]) > 0.2) == odd, (table.name, row.key, mean)
    assert checked > 50


def test_published_values_of_the_text():
    tables = load_tables()
    rows = {name: {row.key: row for row in table.rows} for name, table in tables.items()}
    assert rows["table2"]["4-8-4-rtn"].published["LLaMA-7B"] == {
        "perplexity/c4": 55.1,
        "perplexity/wikitext2": 151.4,
    }
    assert rows["table1"]["8-8-4-llm-qat"].published["LLaMA-30B"]["average"] == 69.7
    assert rows["table1"]["8-8-4-smoothquant"].published["LLaMA-30B"]["average"] == 50.7
    assert rows["table8"]["4-4-4-llm-qat-1ch"].published["LLaMA-7B"]["average"] == 58.6
    assert rows["table7"]["8-8-8-smoothquant"].published["Llama-2-7B"]["average"] == 66.5
    assert rows["table3"]["c4"].published["LLaMA-7B"]["perplexity/wikitext2"] is None


def test_tasks_are_named_as_the_evaluation_names_them():
    assert ZERO_SHOT == CATALOG
    assert set(FEW_SHOT) <= set(TASKS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("colums",), [], "unknown key 'colums'"),
        (("columns",), ["accuracy"], "column 'accuracy'"),
        (("kind",), "plot", "kind 'plot'"),
        (("rows", 0, "method"), "magic", "method 'magic'"),
        (("rows", 0, "method"), "full", "16-16-16"),
        (("rows", 0, "bits"), "4-8", "W-A-KV"),
        (("rows", 0, "data"), "pile", "data 'pile'"),
        (("rows", 0, "records"), 0, "records must be a number above 0"),
        (("rows", 0, "kv_modes"), ["both"], "kv mode 'both'"),
        (("rows", 0, "quant"), {"bits": 3}, "quant: unknown key 'bits'"),
        (("rows", 0, "published"), {"LLaMA-65B": [1]}, "unknown key 'LLaMA-65B'"),
        (("rows", 0, "published"), {"LLaMA-7B": [1, 2]}, "2 values for 1 columns"),
        (("rows", 0, "published"), {"LLaMA-7B": ["high"]}, "'high' is not a number"),
        (("rows", 0, "published"), {}, "lost must say why"),
        (("rows",), VALUES["rows"] * 2, "two rows are called '4-8-4-rtn'"),
    ],
)
def test_a_wrong_table_is_one_line(path, value, message):
    values = copy.deepcopy(VALUES)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message) as error:
        parse_table("mine", values)
    assert "\n" not in str(error.value)


def test_find_tables():
    assert [table.name for table in find_tables("table3")] == ["table3"]
    assert len(find_tables("all")) == 11
    with pytest.raises(ConfigError, match="'table9' is not an experiment; use all, table1"):
        find_tables("table9")
