"""The demonstration's bookkeeping; `make demo` itself is the test of the rest."""

import json
import sys

import pytest

from llmqat import cli
from llmqat.commands import demo
from llmqat.demo.pipeline import Settings, Stage, run_stage, stages
from llmqat.errors import ConfigError


def test_stages_are_the_river_in_order(tmp_path):
    names = [
        stage.name
        for stage in stages(Settings(tmp_path, tmp_path), tmp_path / "teacher", tmp_path / "text")
    ]
    river = [
        "eval_full_precision",
        "generate_data",
        "train",
        "eval_qat",
        "export",
        "eval_packed",
        "generate",
    ]
    assert [name for name in names if name in river] == river


def test_a_finished_stage_is_not_run_again(tmp_path):
    stage = Stage("info", ("info", "--json"))
    first = run_stage(stage, tmp_path)
    path = tmp_path / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": -1.0}))
    assert run_stage(stage, tmp_path)["seconds"] == -1.0
    changed = run_stage(Stage("info", ("info",)), tmp_path)
    assert changed["seconds"] > 0 and changed["command"] != first["command"]


def test_a_failed_stage_says_how_to_rerun_it(tmp_path):
    with pytest.raises(ConfigError, match="rerun: llmqat fly"):
        run_stage(Stage("fly", ("fly",)), tmp_path)
    assert not (tmp_path / "fly.json").exists()
    assert sys.executable


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("bits", "5", "--bits: 5: "),
        ("bits", "16-16-16", "--bits: 16-16-16: w_bits: 16 leaves nothing to pack"),
        ("bits", "4-8-6", "--bits: 4-8-6: kv_bits: 6 has no packed KV cache"),
        ("kv-mode", "both", "--kv-mode: 'both' is not supported"),
        ("records", "0", "--records: 0 is not supported"),
        ("max-len", "1", "--max-len: 1 is not supported"),
        ("steps", "0", "--steps: 0 is not supported"),
        ("batch-size", "0", "--batch-size: 0 is not supported"),
        ("seq-len", "1", "--seq-len: 1 is not supported"),
        ("lr", "nan", "--lr: nan is not supported"),
        ("lr", "0", "--lr: 0 trains nothing"),
        ("eval-tokens", "0", "--eval-tokens: 0 is not supported"),
        ("seed", "-1", "--seed: -1 is not supported"),
    ],
)
def test_a_wrong_option_is_refused_before_any_stage(option, value, says, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda settings: pytest.fail("a stage runs"))
    assert cli.main(["demo", f"--{option}", value]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"llmqat demo: {says}") and said.count("\n") == 1
