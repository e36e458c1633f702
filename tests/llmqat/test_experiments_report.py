"""From cell records to a report, Markdown and pictures."""

import json
import math

import pytest

from llmqat import io
from llmqat.cli import main
from llmqat.commands.experiments import ReportArguments, run_report
from llmqat.errors import ConfigError, DataError
from llmqat.experiments import plots
from llmqat.experiments.render import render
from llmqat.experiments.report import build, groups, portable, summarize
from llmqat.experiments.results import DONE, FAILED, value_of

COLUMN = "perplexity/wikitext2"
SHAPE = {
    "layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64,
    "vocab": 49152, "tied": True,
}  # fmt: skip
PPL = {"16-16-16-full": 20.0, "4-8-16-rtn": 40.0, "4-8-16-smoothquant": 38.0,
       "4-8-16-llm-qat": 24.0, "8-8-16-rtn": 20.5, "8-8-16-smoothquant": 20.2,
       "8-8-16-llm-qat": 20.4}  # fmt: skip


def record(table, row, value, *, seed=0, error=None, kv_mode=None):
    stage = {"name": f"eval-{row}", "hash": f"{table}{row}{seed}", "command": f"llmqat eval {row}",
             "seconds": 2.0, "versions": {"torch": "2"}}  # fmt: skip
    return {
        "cell": f"{table}/{row}#{seed}", "table": table, "row": row, "kv_mode": kv_mode,
        "seed": seed, "model": "m", "model_sha256": "d", "budget": "laptop",
        "status": FAILED if error else DONE, "error": error,
        "values": {} if error else {COLUMN: value}, "errors": {}, "stages": [stage],
        "seconds": 2.0, "shape": SHAPE, "stand_ins": {"text wikitext2": "other prose"},
        "overrides": ["train.steps=3"],
    }  # fmt: skip


@pytest.fixture
def records():
    found = [record("table2", row, value) for row, value in PPL.items()]
    found.append(record("table2", "4-8-16-llm-qat", 26.0, seed=1))
    found.append(record("table2", "4-16-16-gptq", 0, error="gptq: it | broke"))
    found.append(record("table8", "4-4-16-rtn", None))
    return found


@pytest.fixture
def root(tmp_path, records):
    for i, each in enumerate(records):
        folder = io.make_dir(tmp_path / "cells" / "m" / "laptop" / each["table"])
        io.write_json(folder / f"{i}.json", each)
    return tmp_path


def table(report, name):
    return next(t for t in report["tables"] if t["name"] == name)


def test_rows_settings_and_order(records):
    report = build("m", "laptop", records)
    grid = table(report, "table2")
    rows = {row["key"]: row for row in grid["rows"]}
    qat = rows["4-8-16-llm-qat"]["values"][COLUMN]
    assert qat == {"mean": 25.0, "spread": pytest.approx(math.sqrt(2)), "seeds": 2}
    assert rows["4-8-8-rtn"]["status"] == "not run"
    assert rows["4-16-16-gptq"]["error"] == "gptq: it | broke"
    first, second = grid["settings"]
    assert (first["bits"], first["best_ptq"], first["best_ptq_method"]) == (
        "4-8-16", 38.0, "SmoothQuant",
    )  # fmt: skip
    assert first["better"] and first["gap_closed"] == pytest.approx(0.75)
    assert not second["better"]
    order = {entry["model"]: entry for entry in grid["order"]}
    assert order["LLaMA-7B"]["pairs"] <= 21 and order["LLaMA-7B"]["same"] > 10
    assert rows["4-8-16-rtn"]["cost"]["ops"] * 2 == rows["8-8-16-rtn"]["cost"]["ops"]


TEXT, OTHER, WRITER = "aaaaaaaa11", "bbbbbbbb22", "cccccccc33"


def read(text, **more):
    return {"inputs": {"text wikitext2": text, **more}}


def test_cells_of_other_inputs_are_named_and_not_compared(records):
    """A text that changed between two runs: no row stands beside another as if it had not."""
    before = table(build("m", "laptop", records), "table2")
    assert before["inputs"] == {} and before["inputs_by_cells"] == {}
    assert "Read beside the model" not in render(build("m", "laptop", records), {})
    for each in records:
        each |= read(TEXT, generator=WRITER)
    changed = next(r for r in records if r["row"] == "4-8-16-smoothquant")
    changed |= read(OTHER)
    second = next(r for r in records if r["row"] == "4-8-16-llm-qat" and r["seed"] == 1)
    second |= read(OTHER, generator=WRITER)
    report = build("m", "laptop", records)
    grid = table(report, "table2")
    assert grid["inputs"] == {"generator": WRITER, "text wikitext2": TEXT}
    assert grid["inputs_by_cells"]["text wikitext2"] == {TEXT: 7, OTHER: 2}
    qat = [row for row in grid["rows"] if row["key"] == "4-8-16-llm-qat"]
    assert [(row["other_inputs"], row["values"][COLUMN]["mean"]) for row in qat] == [
        ({}, 24.0), ({"text wikitext2": OTHER}, 26.0),
    ]  # fmt: skip
    first = grid["settings"][0]
    assert (first["qat"], first["best_ptq_method"]) == (24.0, "RTN")
    assert len(plots._scored(grid, COLUMN)) == 6
    text = render(report, {})
    assert "| LLM-QAT (text wikitext2 bbbbbbbb) | 4-8-16 | 26.00 |" in text
    assert "different inputs** (text wikitext2 aaaaaaaa in 7, bbbbbbbb in 2 cells)" in text
    assert text.count("different inputs**") == 1  # table 8's one cell agrees with itself


def test_older_records_say_nothing(records):
    records[0] |= read(TEXT)
    grid = table(build("m", "laptop", records), "table2")
    assert all(row["other_inputs"] == {} for row in grid["rows"])
    assert "text wikitext2 aaaaaaaa; 8 older cells do not say." in render(
        build("m", "laptop", records), {}
    )


def test_figure1_shows_tables_of_the_same_inputs(records):
    for each in records:
        each |= read(TEXT)
    other = record("table1", "8-8-16-rtn", 20.9) | read(OTHER)
    report = build("m", "laptop", [*records, other])
    assert {row["key"] for row, _ in plots._points(report)[1]} == set(PPL)
    notes = table(report, "figure1")["notes"]
    assert notes[-1] == "The picture leaves out table1: the cells there read other inputs."


def test_several_processes_are_shown(records):
    for each in records:
        if each["row"] == "4-8-16-llm-qat":
            each["processes"] = 2
    text = render(build("m", "laptop", records), {})
    assert "| LLM-QAT (2 processes) | 4-8-16 |" in text and text.count("processes)") == 1


def test_two_models_of_one_name_have_two_reports(tmp_path, root, records, capsys):
    run_report(ReportArguments(output=str(root)))
    assert (
        "on m, budget laptop\n\nModel m, SHA-256 d; "
        in (root / "report" / "m-laptop" / "report.md").read_text()
    )
    folder = io.make_dir(root / "cells" / "m-eeeeeeee" / "laptop" / "table2")
    other = record("table2", "8-8-16-rtn", 99.0) | {"model_sha256": "eeeeeeee44"}
    io.write_json(folder / "0.json", other)
    run_report(ReportArguments(output=str(root)))
    first, second = (
        (root / "report" / f"m-{digest}-laptop" / "report.md").read_text()
        for digest in ("d", "eeeeeeee")
    )
    assert "on m-d, budget laptop" in first and "99.00" not in first
    assert "on m-eeeeeeee, budget laptop" in second and "99.00" in second
    assert "1 cells done, 0 failed" in second
    capsys.readouterr()
    main(["experiments", "list", "--output", str(root)])
    assert "m-d laptop: 8 done, m-eeeeeeee laptop: 1 done" in capsys.readouterr().out


@pytest.mark.parametrize("speed", [["4-8-8=110"], ["9-9-9=110", "16-16-16=3"], ["16-16-16=3"]])
def test_speeds_that_figure4_has_no_use_for(root, speed):
    with pytest.raises(ConfigError, match="--speed: "):
        run_report(ReportArguments(output=str(root), speed=speed))
    assert not (root / "report" / "m-laptop" / "report.md").exists()


def test_infinite_perplexity_is_kept_apart(records):
    report = build("m", "laptop", records)
    rows = {row["key"]: row for row in table(report, "table8")["rows"]}
    assert rows["4-4-16-rtn"]["values"][COLUMN] == {"mean": None, "spread": None, "seeds": 1}
    assert summarize([]) is None and summarize([1.0])["spread"] is None


def test_changes_of_the_budget_are_named_where_they_apply(records):
    del records[0]["overrides"]
    report = build("m", "laptop", records)
    assert table(report, "table2")["overrides"] == ["train.steps=3 (8 of 9 cells)"]
    assert table(report, "table8")["overrides"] == ["train.steps=3"]
    assert table(report, "table3")["overrides"] == []


def test_neighbours_in_figure1_share_a_label():
    def point(bits, gib, value, method="llm-qat"):
        return {"bits": bits, "method": method, "cost": {"total_gib": gib}}, value

    points = [
        point("4-8-16", 0.147, 27.8), point("4-16-16", 0.147, 27.7), point("4-8-4", 0.115, 33.0),
        point("4-8-8", 0.147, 60.0, "rtn"), point("16-16-16", 0.294, 20.0, "full"),
        point("4-8-4", 0.114, 34.0),
    ]  # fmt: skip
    assert plots._names(points, "total_gib") == [
        ("16-16-16", (0.294, 20.0)), ("4-16-16, 4-8-16", (0.147, 27.7)), ("4-8-4", (0.115, 33.0)),
    ]  # fmt: skip


def test_the_report_is_written(root, capsys):
    run_report(ReportArguments(output=str(root), speed=["16-16-16=20", "4-8-8=110"]))
    folder = root / "report" / "m-laptop"
    assert str(folder / "report.md") in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    for part in (
        "| LLM-QAT | 4-8-16 | 25.00 ± 1.41 (2) | 10.9 | 7.4 |",
        "failed: gptq: it / broke", "not run",
        "text wikitext2: other prose", "Changes of the budget here: train.steps=3.",
        "LLM-QAT is better than the best",
        "5.50x, measured", "inf",
    ):  # fmt: skip
        assert part in text, part
    report = json.loads((folder / "report.json").read_text())
    assert report["cells"] == {"done": 9, "failed": 1}
    assert "llmqat eval 4-8-16-rtn\n" in (folder / "commands.txt").read_text()
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"table2.png", "figure1.png", "figure4.png"}


def test_commands_are_those_of_any_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = f"llmqat eval --model {tmp_path}/m --text {tmp_path}/a/t.txt --output /elsewhere/o"
    assert portable(command) == "llmqat eval --model m --text a/t.txt --output /elsewhere/o"


def test_nothing_to_report(tmp_path, root):
    with pytest.raises(DataError, match="no results; run llmqat experiments run"):
        groups(tmp_path / "empty")
    with pytest.raises(DataError, match="no results of other"):
        run_report(ReportArguments(output=str(root), model="other"))


def test_values_of_results():
    assert value_of(COLUMN, {"perplexity": 3.5}) == 3.5
    assert value_of(COLUMN, {"perplexity": None, "nll": 900.0}) == math.inf
    boolq = {"metric": "acc_answer", "acc": 0.2, "acc_answer": 0.7}
    result = {"tasks": {"boolq": boolq, "mmlu": {"metric": "acc", "acc": 0.3}}, "average": 0.61}
    assert value_of("boolq", result) == pytest.approx(70)
    assert value_of("average", result) == pytest.approx(61)
    assert value_of("mmlu", result) == pytest.approx(30)
    with pytest.raises(DataError, match="piqa"):
        value_of("piqa", result)


def test_bars_of_two_kv_modes_are_told_apart():
    """One setting in both modes has one label in the table; a column says which mode it is."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [
        {
            "label": "LLM-QAT", "method": "llm-qat", "bits": "4-8-4", "kv_mode": mode,
            "values": {COLUMN: {"spread": None}},
        }
        for mode in ("paper", "serving")
    ]  # fmt: skip
    table = {"name": "beyond", "title": "both modes"}
    figure = plots._rows(pyplot, table, [(rows[0], 28.6), (rows[1], 28.0)], COLUMN)
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    pyplot.close(figure)
    assert ticks == ["LLM-QAT, 4-8-4 paper", "LLM-QAT, 4-8-4 serving"]
