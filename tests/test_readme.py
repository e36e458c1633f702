"""The Python of the README and of docs/*.md runs as printed, and the examples do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import llmqat
from llmqat import cli
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def _docs_snippets() -> dict[str, list[str]]:
    """Page -> its indented blocks that import something."""
    snippets = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", page.read_text(), re.M)
        found = [dedent(b) for b in blocks if re.search(r"^ {4}(?:from \S+ )?import ", b, re.M)]
        if found or "```python" in page.read_text():
            snippets[page.name] = found
    return snippets


SNIPPETS = _docs_snippets()


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


def test_every_docs_snippet_is_tested():
    assert {name: len(found) for name, found in SNIPPETS.items()} == {
        "evaluation.md": 1,
        "post-training.md": 1,
    }


def test_the_post_training_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("teacher")
    data = ["--output", "data", "--num-records", "3", "--max-len", "512", "--first-token", "random"]
    assert cli.main(["generate-data", "--model", "teacher", *data]) == 0
    exec(compile(SNIPPETS["post-training.md"][0], "post-training.md", "exec"), {})
    assert llmqat.from_pretrained("packed").config.vocab_size == 128


def test_the_evaluation_snippet_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("qat")
    save_character_tokenizer(tmp_path / "qat")
    exec(compile(SNIPPETS["evaluation.md"][0], "evaluation.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1


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
