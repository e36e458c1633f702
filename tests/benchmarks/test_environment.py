"""What stands beside every figure."""

from benchmarks.timing import environment


def test_without_git_there_is_no_commit(monkeypatch):
    assert environment().keys() >= {"processor", "torch", "commit", "date"}
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None
