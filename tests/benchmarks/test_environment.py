"""What stands beside every figure."""

import shutil
import subprocess

import pytest
import torch

from benchmarks import cells, timing
from benchmarks.timing import environment

CUDA = torch.device("cuda")


@pytest.fixture
def no_git(monkeypatch):
    """As in a copy of the tree; nothing has been warned of yet."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLMQAT_COMMIT", raising=False)
    timing.warn_without_commit.cache_clear()
    yield
    timing.warn_without_commit.cache_clear()


def test_without_git_there_is_no_commit(monkeypatch):
    assert environment().keys() >= {"processor", "torch", "commit", "date"}
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLMQAT_COMMIT", raising=False)
    assert environment()["commit"] is None


@pytest.mark.parametrize(("said", "found"), [("abc1234", "abc1234"), (" ", None)])
def test_without_git_the_variable_says_the_commit(no_git, monkeypatch, said, found):
    monkeypatch.setenv("LLMQAT_COMMIT", said)
    assert environment()["commit"] == found


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_copy_inside_another_checkout_has_not_its_commit(monkeypatch, tmp_path):
    git = ("git", "-c", "user.name=a", "-c", "user.email=a", "-C", tmp_path)
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "x"], check=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.setenv("LLMQAT_COMMIT", "abc1234")
    monkeypatch.setattr(timing, "TREE", copy)
    assert environment()["commit"] == "abc1234"
    monkeypatch.setattr(timing, "TREE", tmp_path)
    assert environment()["commit"] not in (None, "abc1234")


def test_saving_a_gpu_result_without_a_commit_is_one_warning(no_git, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "environment", lambda device: {"commit": None})
    monkeypatch.setattr(cells.records, "where", lambda clock, device: {})
    timing.save("cpu_figure", {})
    cells.Recorder("gemm", CUDA, False, tmp_path)
    assert capsys.readouterr().err == ""
    assert timing.save("figure", {"a": 1}, CUDA).exists()
    cells.Recorder("gemm", CUDA, True, tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "set LLMQAT_COMMIT" in said


def test_with_a_commit_nothing_is_said(no_git, monkeypatch, capsys):
    monkeypatch.setenv("LLMQAT_COMMIT", "abc1234")
    timing.warn_without_commit("cuda")
    assert capsys.readouterr().err == ""
