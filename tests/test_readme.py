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


def test_every_block_is_tested():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("name", ["quickstart.py"])
def test_examples_run(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "packed model continues" in done.stdout
