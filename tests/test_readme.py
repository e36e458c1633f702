"""The README's Python runs as printed, and the example does what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.llmqat.tiny import tiny_llama

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_first_block_is_eight_lines_and_runs(tmp_path, monkeypatch, capsys):
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 8
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {"folder": tmp_path / "model"})
    *report, tokens = capsys.readouterr().out.strip().splitlines()
    assert len(json.loads(tokens)) == 5
    assert "quantized" in report[0]


def test_the_kernel_block_runs():
    scope: dict = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), scope)
    assert scope["y"].shape == (8, 64)


def test_the_module_block_runs():
    scope: dict = {}
    exec(compile(BLOCKS[2], "README.md", "exec"), scope)
    assert scope["q"].shape == scope["stream"].shape == (2, 8, 64)


def test_every_block_is_tested():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quickstart.py", r"packed model continues \[5, 6, 7\]"),
        ("drop_in.py", r"LLaMA of Hugging Face: loss 3\.\d+ -> 2\.\d+\nown: loss 4\.\d+ -> 0\.0"),
    ],
)
def test_examples_run(name, says, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout)


def test_the_drop_in_example_is_short():
    assert len((ROOT / "examples" / "drop_in.py").read_text().splitlines()) < 80
