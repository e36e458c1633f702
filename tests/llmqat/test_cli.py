"""The command line: overview, YAML recipes, one-line errors."""

import gc
import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

import llmqat
from llmqat import cli
from llmqat.errors import ConfigError


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
    ("raw", "says"),
    [
        (b"a: b: c\n x", "not valid YAML (line 1)"),
        (b"model: m\n\tsteps: 3", "not valid YAML (line 2)"),
        (b"steps: 3\nmodel: \xff", "not valid YAML (line 2: not UTF-8)"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"model: 2026-02-31\n", "not valid YAML"),
        (b"steps: 3\nsteps: 4\n", "steps: stands there twice (line 2); leave one out"),
        (b"max-len: 3\nmax_len: 4\n", "max_len: stands there twice (line 2); leave one out"),
        (b"false", "expected a mapping of options, got bool"),
    ],
)
def test_a_recipe_that_cannot_be_read(raw, says, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(raw)
    assert cli.main(["train", "--config", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"llmqat train: --config {recipe}: {says}") and said.count("\n") == 1


@dataclass
class Every:
    """An option of each kind."""

    name: str = "x"
    bits: str | None = None
    text: list[str] | None = None
    steps: int | None = None
    epochs: float = 1.0
    resume: bool = False
    graphs: bool = True


def parse_recipe(tmp_path, text, kind=Every):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    (options,) = cli.parse_arguments("train", [kind], ["--config", str(recipe)])
    return options


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("bits: 4-8-4", "bits", "4-8-4"),
        ("bits: null", "bits", None),
        ("text: text.txt", "text", ["text.txt"]),
        ("text: [a, b]", "text", ["a", "b"]),
        ("steps: 3", "steps", 3),
        ("steps: '3'", "steps", 3),
        ("epochs: 2", "epochs", 2.0),
        ("epochs: 1e-4", "epochs", 1e-4),  # which is text in YAML 1.1
        ("resume: true", "resume", True),
        ("resume: 'yes'", "resume", True),
        ("graphs: false", "graphs", False),
    ],
)
def test_a_value_of_a_recipe_has_the_type_of_its_option(text, name, value, tmp_path):
    found = getattr(parse_recipe(tmp_path, text), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: 3", "name: expected text, got int; put it in quotes"),
        ("name: null", "name: expected text, got null"),
        ("name: [a]", "name: expected text, got list"),
        ("bits: 8", "bits: expected text, got int; put it in quotes"),
        ("bits: true", "bits: expected text, got bool; put it in quotes"),
        ("text: 3", "text: expected text, got int"),
        ("text: [a, 3]", "text: expected text, got int"),
        ("text: []", "text: expected at least one value, got an empty list"),
        ("text: {a: b}", "text: expected text, got dict"),
        ("steps: 3.5", "steps: expected a whole number, got float"),
        ("steps: true", "steps: expected a whole number, got bool"),
        ("steps: many", "steps: expected a whole number, got 'many'"),
        ("epochs: [1]", "epochs: expected a number, got list"),
        ("epochs: null", "epochs: expected a number, got null"),
        (f"epochs: {'9' * 400}", "epochs: expected a number, got int"),
        ("resume: 1", "resume: expected true or false, got int"),
        ("resume: perhaps", "resume: expected true or false, got 'perhaps'"),
        ("help: true", "unknown option 'help'"),
        ("config: x", "unknown option 'config'"),
        ("no_graphs: true", "unknown option 'no_graphs'"),
    ],
)
def test_a_value_of_another_type_names_the_file_and_the_option(text, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(tmp_path, text)
    assert str(caught.value).startswith(f"--config {tmp_path / 'recipe.yaml'}: {says}")


def test_a_recipe_cannot_set_a_required_option_to_nothing(tmp_path):
    with pytest.raises(ConfigError, match="model: expected text, got null"):
        parse_recipe(tmp_path, "model: null", Options)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmqat {llmqat.__version__}\n"


def test_an_unknown_action_has_status_2(capsys):
    assert cli.main(["bench", "foo"]) == 2
    assert capsys.readouterr().err == "llmqat bench: unknown action 'foo'; use kv\n"


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
    [
        ("--max-length", "did you mean --max-len?"),
        ("--num-record", "did you mean --num-records?"),  # no abbreviations
        ("--num-record=2", "did you mean --num-records?"),
        ("twenty", "see llmqat generate-data --help"),
    ],
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
