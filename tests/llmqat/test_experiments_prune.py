"""Freeing models: what goes, what stays, and when nothing may go."""

import json

import pytest

from llmqat import cli, io
from llmqat.errors import ConfigError, DataError
from llmqat.experiments.prune import find_models, prune
from llmqat.experiments.stages import LOCK, OUTPUT, RESULT


def stage(root, name, command, *, done=True):
    folder = io.make_dir(root / "stages" / name)
    io.write_text(io.make_dir(folder / OUTPUT / "inside") / "weights", "x" * 100)
    io.write_text(folder / LOCK, "")
    if done:
        io.write_json(folder / RESULT, {"command": f"llmqat {command} --model m", "result": {}})
    return folder


@pytest.fixture
def root(tmp_path):
    stage(tmp_path, "a-train", "train")
    stage(tmp_path, "b-gptq", "quantize --method gptq")
    stage(tmp_path, "c-generate", "generate-data")
    stage(tmp_path, "d-train", "train", done=False)
    launched = stage(tmp_path, "e-train", "train")
    io.write_json(
        launched / RESULT, {"command": "accelerate launch -m llmqat.cli train", "result": {}}
    )
    return tmp_path


def test_models_of_finished_stages_go(root, capsys):
    assert cli.main(["experiments", "prune", "--output", str(root), "--dry-run"]) == 0
    assert "would free 0.00 GiB, 3 models" in capsys.readouterr().out
    assert [(model.folder.parent.name, model.nbytes) for model in prune(root)] == [
        ("a-train", 100), ("b-gptq", 100), ("e-train", 100),
    ]  # fmt: skip
    left = sorted(path.parent.name for path in root.glob(f"stages/*/{OUTPUT}"))
    assert left == ["c-generate", "d-train"]
    assert len(list(root.glob(f"stages/*/{RESULT}"))) == 4
    assert prune(root) == []


def test_nothing_goes_while_a_run_works(root):
    with io.Lock(root / "stages" / "d-train" / LOCK), pytest.raises(ConfigError, match="d-train"):
        prune(root)
    assert len(list(find_models(root))) == 3


def test_damage_is_named_and_nothing_goes(root):
    path = root / "stages" / "c-generate" / RESULT
    path.write_text(json.dumps(["no record"]))
    with pytest.raises(DataError, match="c-generate"):
        prune(root)
    assert (root / "stages" / "a-train" / OUTPUT).is_dir()
