"""Commands of two words."""

from dataclasses import dataclass

import pytest

from llmqat.cli import parse_arguments
from llmqat.commands.actions import Action, UsageError, run_action


@dataclass
class Options:
    """Options of the actions here."""

    steps: int = 3


def run(argv):
    seen = []
    actions = {
        "go": Action("go there", (Options,), lambda *a: seen.append(a), ("WHERE",)),
        "stop": Action("stop", (), lambda: 7),
    }
    return run_action("demo", actions, argv, parse_arguments), seen


def test_words_come_before_options():
    assert run(["go", "home", "--steps", "5"]) == (None, [("home", Options(5))])
    assert run(["stop"]) == (7, [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "unknown action 'fly'; use go or stop"),
        (["go"], r"WHERE: not given; write llmqat demo go WHERE"),
        (["go", "--steps", "5"], "WHERE: not given"),
    ],
)
def test_wrong_words(argv, message):
    with pytest.raises(UsageError, match=message):
        run(argv)


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["--help"], 0), (["go", "--help"], 0)])
def test_help(argv, status, capsys):
    with pytest.raises(SystemExit) as ended:
        run(argv)
    assert ended.value.code == status
    assert "go" in capsys.readouterr().out
