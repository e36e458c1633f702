"""The demonstration's bookkeeping; `make demo` itself is the test of the rest."""

import json
import sys

import pytest

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
