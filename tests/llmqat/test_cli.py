"""The command line: overview, YAML recipes, one-line errors."""

import gc
import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from llmqat import cli


@dataclass
class Options:
    model: str = field(metadata={"help": "a folder"})
    steps: int = field(default=3, metadata={"help": "a number"})


def parse(*argv):
    (options,) = cli.parse_arguments("train", [Options], argv)
    return options


def test_overview_needs_no_torch():
    code = "import sys, llmqat.cli as c; c.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "--config" in capsys.readouterr().out


def test_only_the_program_freezes_what_is_imported(monkeypatch, capsys):
    """Who calls `main` with arguments keeps a garbage collector that sees everything."""
    frozen = []
    monkeypatch.setattr(cli.gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with pytest.raises(SystemExit):
        cli.main(["info", "--help"])
    assert frozen == []
    monkeypatch.setattr(sys, "argv", ["llmqat", "info", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert frozen == [False] and gc.isenabled()


def test_unknown_command(capsys):
    assert cli.main(["fly"]) == 2
    assert "fly" in capsys.readouterr().err


def test_yaml_sets_defaults_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: here\nsteps: 7\n")
    assert parse("--config", str(recipe)) == Options("here", 7)
    assert parse("--config", str(recipe), "--steps", "9") == Options("here", 9)
    assert parse("--model", "there") == Options("there", 3)


def test_yaml_with_an_unknown_option(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: here\n")
    with pytest.raises(ValueError, match="modle"):
        parse("--config", str(recipe))
    recipe.write_text("- a\n")
    with pytest.raises(ValueError, match="mapping"):
        parse("--config", str(recipe))


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["eval", "--model", "/no/such/folder", "--text", "/no/such/text"], "/no/such"),
        (["export", "--model", "/no/such/folder", "--output", "x"], "/no/such"),
        (["train", "--config", "/no/such.yaml"], "/no/such.yaml"),
        (["generate", "--model", "/no/such/folder", "--prompt", "a"], "/no/such"),
    ],
)
def test_failures_are_one_line(argv, word, capsys):
    assert cli.main(argv) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"llmqat {argv[0]}:") and word in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "m"], "the following arguments are required: --output"),
        (["--model", "m", "--output"], "argument --output: expected one argument"),
        (
            ["--model", "m", "--output", "o", "--num-records", "many"],
            "argument --num_records/--num-records: invalid int value: 'many'",
        ),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate-data", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == f"llmqat generate-data: {says}; see llmqat generate-data --help\n"


@pytest.mark.parametrize(
    ("argument", "hint"),
    [("--max-length", "did you mean --max-len?"), ("twenty", "see llmqat generate-data --help")],
)
def test_an_unknown_argument_is_one_line_and_status_2(argument, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate-data", "--model", "m", "--output", "o", argument, "20"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == f"llmqat generate-data: unknown argument {argument!r}; {hint}\n"


def test_a_reader_that_goes_away_ends_a_command_quietly():
    command = f"{sys.executable} -m llmqat.cli info | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("spec") and done.stderr == ""


def test_info_json(capsys):
    from llmqat_kernels.schemas import SCHEMAS

    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert set(info["operators"]["cpu"]) == set(SCHEMAS)
    assert all(
        c["backend"] in ("cpu", "reference") and c["reason"]
        for c in info["operators"]["cpu"].values()
    )
    assert cli.main(["info"]) == 0
    assert "operators on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "resumes"), [("info", False), ("generate-data", True), ("bench", False)]
)
def test_an_interruption_promises_to_resume_only_what_can(command, resumes, monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupt)
    assert cli.main([command]) == 130
    assert ("resume" in capsys.readouterr().err) == resumes
    assert set(cli.RESUMED) <= set(cli.COMMANDS)
