"""``llmqat experiments`` as a user types it; every table and figure at smoke budget."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from llmqat.cli import main
from llmqat.experiments.results import read_cells
from tests.llmqat.processes import FSDP2
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_tokenizer

TEXTS = ("wikitext2", "wikitext103", "c4")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The options that name a tiny model and its texts."""
    folder = tmp_path_factory.mktemp("experiments")
    model = folder / "tiny"
    tiny_llama(tied=True, layers=1, heads=2, kv_heads=1, intermediate=48).save_pretrained(model)
    save_tokenizer(model)
    generator = random.Random(0)
    for name in (*TEXTS, "scored"):
        text = " ".join(f"w{generator.randint(3, 127)}" for _ in range(600))
        (folder / f"{name}.txt").write_text(text)
    return [
        "--model", str(model), "--budget", "smoke", "--threads", "1",
        "--text", f"wikitext2={folder}/scored.txt", f"c4={folder}/c4.txt",
        "--train-text", *(f"{name}={folder}/{name}.txt" for name in TEXTS),
    ]  # fmt: skip


def values(root):
    return {record["cell"]: record["values"] for record in read_cells(root)}


def test_list(tmp_path, capsys):
    assert main(["experiments", "list", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "table8    17 rows" in out and "figure4" in out and "laptop" in out


def test_dry_run_prints_commands(tmp_path, words, capsys):
    output = ["--output", str(tmp_path), "--dry-run", "--only", "4-16-16-gptq"]
    assert main(["experiments", "run", "table2", *words, *output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# table2/4-16-16-gptq#0"
    assert [line.split()[1] for line in lines[1:]] == ["generate-data", "quantize", "eval", "eval"]
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "table9", "--model", "m"], "'table9' is not an experiment"),
        (["run", "table2", "--model", "m", "--seeds", "a"], "config.json"),
        (["run", "table2", "--model", "m", "--kv-mode", "all"], "--kv-mode: 'all'"),
        (["run", "table2", "--model", "m", "--resume", "--restart"], "contradict"),
        (
            ["run", "table2", "--model", "m", "--set", "train.foo=3", "--dry-run"],
            "--set: train.foo",
        ),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["experiments", *arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.lr=nan", "llmqat train (train-4-16-16): --lr: nan is not supported"),
        ("train.batch_size=0", "--batch-size: 0 is not supported"),
        ("train.loss_layers=first", "--loss-layers: 'first' is not supported"),
    ],
)
def test_values_are_checked_before_any_stage_runs(words, change, message, tmp_path, capsys):
    run = ["run", "table2", *words, "--output", str(tmp_path), "--only", "4-16-16-llm-qat"]
    assert main(["experiments", *run, "--set", change]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown action 'fly'"),
        (["run", "--model", "m"], "NAME: not given"),
    ],
)
def test_wrong_words_have_status_2(arguments, message, capsys):
    assert main(["experiments", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_one_cell_runs_resumes_and_reports(tmp_path, words, capsys):
    command = ["experiments", "run", "table2", *words, "--output", str(tmp_path)]
    only = ["--only", "8-8-16-rtn"]
    assert main([*command, *only]) == 0
    assert "1 of 1 cells done, 2 stages run" in capsys.readouterr().err
    assert main([*command, *only]) == 0
    assert "0 stages run" in capsys.readouterr().err
    (result,) = (tmp_path / "stages").glob("*wikitext2/result.json")
    result.unlink()
    assert main([*command, *only]) == 1
    assert "1 half-done stages" in capsys.readouterr().err
    assert main([*command, *only, "--resume"]) == 0
    assert "1 stages run" in capsys.readouterr().err
    assert main(["experiments", "list", "--output", str(tmp_path)]) == 0
    assert "tiny smoke: 1 done" in capsys.readouterr().out


def test_shards_share_the_cells(tmp_path, words, capsys):
    command = ["experiments", "run", "table2", *words, "--output", str(tmp_path), "--dry-run"]
    found = []
    for shard in ("0/2", "1/2"):
        assert main([*command, "--shard", shard]) == 0
        lines = capsys.readouterr().out.splitlines()
        found.append({line for line in lines if line.startswith("# table2/")})
    assert not found[0] & found[1] and len(found[0] | found[1]) == 31


@pytest.mark.slow
def test_every_table_and_figure_at_smoke_budget(tmp_path, words):
    """The bar of the project: all of them within five minutes on two slow cores. The clock is the
    processor's, so that other work on the machine does not count.
    """
    pytest.importorskip("lm_eval")
    started = time.process_time()
    status = main(["experiments", "run", "all", *words, "--output", str(tmp_path)])
    seconds = time.process_time() - started
    records = list(read_cells(tmp_path))
    assert {record["cell"]: record["error"] for record in records if record["error"]} == {}
    assert status == 0 and len(records) == 177
    assert seconds < 300
    assert main(["experiments", "report", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report" / "tiny-smoke" / "report.json").read_text())
    assert all(row["status"] == "done" for table in report["tables"] for row in table["rows"])
    pictures = list((tmp_path / "report" / "tiny-smoke").glob("*.png"))
    assert len(pictures) == len(report["tables"]) == 11


@pytest.mark.slow
def test_a_cell_trains_in_two_processes(tmp_path, words):
    """What docs/distributed.md says, typed as it says: accelerate, FSDP2 and gloo on a CPU."""
    launcher = f"{sys.executable} -m accelerate.commands.launch --num_processes 2"
    command = [
        "experiments", "run", "table2", *words, "--output", str(tmp_path), "--only",
        "4-8-4-llm-qat@serving", "--set", "train.steps=2", "train.batch_size=1",
        "--launch", f"{launcher} --config_file {FSDP2}",
    ]  # fmt: skip
    assert main(command) == 0
    (record,) = read_cells(tmp_path)
    assert (record["status"], record["processes"]) == ("done", 2)
    (folder,) = (tmp_path / "stages").glob("*-train-4-8-4")
    ran = json.loads((folder / "output" / "llmqat_run.json").read_text())
    assert (ran["steps"], ran["processes"], ran["status"]) == (2, 2, "complete")
    assert main(["experiments", "report", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "tiny-smoke" / "report.md").read_text()
    assert "| LLM-QAT (2 processes) | 4-8-4 serving |" in text


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_numbers(tmp_path, words):
    """Killed wherever it happens to be, again and again, until it ends."""
    only = ["--only", "4-8-4-*@serving", "--set", "train.steps=6", "train.save_steps=2"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = ["experiments", "run", "table2", *words, *only]
    assert main([*command, "--output", str(straight)]) == 0
    child = [sys.executable, "-m", "llmqat.cli", *command, "--output", str(killed), "--resume"]
    kills = 0
    for delay in (3.0, 0.8, 1.5, 0.4):
        with subprocess.Popen(child, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            # Start-up takes seconds: the clock runs from the first file on.
            while process.poll() is None and time.monotonic() < deadline:
                if (killed / "stages").is_dir() and any((killed / "stages").iterdir()):
                    break
                time.sleep(0.05)
            time.sleep(delay)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
    assert kills
    assert main([*command, "--output", str(killed), "--resume"]) == 0
    assert values(killed) == values(straight)
