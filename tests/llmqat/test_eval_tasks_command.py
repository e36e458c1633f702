"""`llmqat eval`: protocols, methods, question sets, files that outlive a failure."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmqat
import llmqat_kernels as qk
from llmqat import cli
from llmqat.eval import run
from llmqat.eval.tasks import suite
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer

pytest.importorskip("lm_eval")

BITS = ("--bits", "4-8-4", "--kv-mode", "serving")
TASKS = ("--tasks", "piqa,boolq", "--tasks-dir", "samples", "--limit", 2)
TEXT = "The tower clock is wound by hand each morning. " * 12


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plain"
    llmqat.save_pretrained(tiny_llama(tied=True), folder)
    save_character_tokenizer(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    rows = [{"text": "one two"}, {"text": "three"}]
    (folder.parent / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), folder.parent / "rows.parquet")
    return folder


def _json(capsys, *argv):
    assert cli.main(["eval", *map(str, argv), "--json"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def _fail(capsys, *argv):
    assert cli.main(["eval", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_protocols(folder, capsys, tmp_path):
    common = ("--model", folder, "--seq-len", 32)
    text, rows = folder.parent / "text.txt", folder.parent / "rows.jsonl"
    windows = _json(capsys, *common, "--text", text)
    word = _json(capsys, *common, "--text", text, "--protocol", "word")
    assert (windows["protocol"], word["protocol"]) == ("windows", "word")
    assert word["words"] == len(TEXT.split()) + 1 and word["tokens"] == len(TEXT)
    assert word["perplexity"] > windows["perplexity"]
    joined = folder.parent / "joined.txt"
    joined.write_text("one two\n\nthree")
    short = ("--model", folder, "--seq-len", 4, "--text")
    expected = _json(capsys, *short, joined)
    for path in (rows, folder.parent / "rows.parquet"):
        same = _json(capsys, *short, path)
        assert (same["nll"], same["tokens"]) == (expected["nll"], expected["tokens"])
    several = _json(capsys, *common, "--protocol", "word", "--text", text, rows)
    assert several["texts"][0]["perplexity"] == word["perplexity"]
    assert several["texts"][1]["documents"] == 2 and "perplexity" not in several
    argv = ("--text", text, rows, "--protocol", "word", "--output", tmp_path / "out.json")
    assert cli.main(["eval", *map(str, (*common, *argv))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("word perplexity ") for line in lines)
    assert json.loads((tmp_path / "out.json").read_text())["texts"][1]["words"] == 3


def test_method_equals_the_packed_checkpoint(folder, capsys, tmp_path):
    argv = ["--model", folder, "--method", "rtn", "--output", tmp_path / "packed", *BITS]
    assert cli.main(["quantize", *map(str, argv)]) == 0
    capsys.readouterr()
    what = ("--text", folder.parent / "text.txt", "--seq-len", 32, *TASKS)
    packed = _json(capsys, "--model", tmp_path / "packed", *what)
    here = _json(capsys, "--model", folder, "--method", "rtn", *BITS, *what)
    assert (here["stage"], here["method"], packed["method"]) == ("rtn", "rtn", None)
    assert here["perplexity"] == packed["perplexity"]
    for result in (here, packed):
        for entry in result["tasks"].values():
            del entry["seconds"]
    assert here["tasks"] == packed["tasks"]


def test_a_method_with_options(folder, capsys):
    text = folder.parent / "text.txt"
    result = _json(
        capsys,
        *("--model", folder, "--method", "gptq", *BITS, "--text", text, "--seq-len", 32),
        *("--calibration", text, "--calibration-seq-len", 16, "--calibration-batch-size", 4),
        *("--sequences", 8, "--act-order"),
    )
    assert result["stage"] == "gptq" and result["perplexity"] > 1


def test_low_rank_correction(folder, tmp_path, capsys):
    """The other half of ZeroQuant-V2 is reached by a flag; at all ranks nothing is lost."""
    text, square = folder.parent / "text.txt", tmp_path / "square"
    llmqat.save_pretrained(tiny_llama(kv_heads=4, intermediate=64), square)
    save_character_tokenizer(square)
    common = ("--model", square, "--text", text, "--seq-len", 32)
    options = ("--bits", "3-16-16", "--method", "zeroquant", "--steps", 1, "--sequences", 2)
    options += ("--calibration", text, "--calibration-seq-len", 16)
    full = _json(capsys, *common)["nll"]
    plain = _json(capsys, *common, *options)
    ranked = _json(capsys, *common, *options, "--rank", 64)
    assert "rank" not in plain and ranked["rank"] == 64
    assert abs(ranked["nll"] - full) < 1e-4 < abs(plain["nll"] - full)
    assert cli.main(["eval", *map(str, (*common, *options, "--rank", 2))]) == 0
    assert "(zeroquant with rank 2, " in capsys.readouterr().out


def test_a_task_that_does_not_fit(folder, tmp_path, capsys, monkeypatch):
    """Said before the model is loaded and before other tasks run, in one line."""
    small = tmp_path / "small"
    model = tiny_llama(tied=True)
    model.config.max_position_embeddings = 256
    llmqat.save_pretrained(model, small)
    save_character_tokenizer(small)
    monkeypatch.setattr(run, "load_for_evaluation", None)
    argv = ("--model", small, "--tasks", "piqa,triviaqa", "--tasks-dir", "samples", "--limit", 2)
    assert cli.main(["eval", *map(str, argv), "--shots", "0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--tasks: triviaqa needs " in error and "256 of them to write" in error
    assert "the model's context has 256; leave it out\n" in error
    few = _fail(capsys, "--model", folder, *argv[2:])
    assert few.endswith("context has 512; leave it out, or give fewer --shots")


def test_tasks(folder, capsys):
    result = _json(capsys, "--model", folder, *TASKS)
    assert list(result["tasks"]) == ["piqa", "boolq"] and result["complete"]
    assert result["average_of"] == 2 and "perplexity" not in result
    found = result["tasks"]
    expected = (found["piqa"]["acc_norm"] + found["boolq"]["acc_answer"]) / 2
    assert result["average"] == expected
    assert cli.main(["eval", "--model", str(folder), *map(str, TASKS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "setting 16-16-16 (full_precision)"
    assert lines[1].split()[:3] == ["task", "reported", "score"]
    assert [line.split()[:2] for line in lines[2:4]] == [
        ["piqa", "acc_norm"],
        ["boolq", "acc_answer"],
    ]
    assert lines[4].startswith("average of 2 zero-shot tasks: ")


def test_a_failing_task_loses_itself_only(folder, capsys, tmp_path, monkeypatch):
    output = tmp_path / "result.json"
    argv = ("--model", folder, *TASKS, "--output", output)
    evaluate, seen = suite._evaluate, []

    def fails_at_boolq(lm, task, limit):
        seen.append(task.name)
        if task.name == "boolq":
            raise RuntimeError("out of luck")
        return evaluate(lm, task, limit)

    monkeypatch.setattr(suite, "_evaluate", fails_at_boolq)
    assert _fail(capsys, *argv).endswith("out of luck")
    kept = json.loads(output.read_text())
    assert list(kept["tasks"]) == ["piqa"] and not kept["complete"]

    def counts(lm, task, limit):
        seen.append(task.name)
        return evaluate(lm, task, limit)

    monkeypatch.setattr(suite, "_evaluate", counts)
    result = _json(capsys, *argv, "--resume")
    assert seen == ["piqa", "boolq", "boolq"]
    assert result["complete"] and result["tasks"]["piqa"] == kept["tasks"]["piqa"]
    assert json.loads(output.read_text()) == result
    assert _json(capsys, *argv, "--resume")["tasks"] == result["tasks"]
    changed = _fail(capsys, *argv, "--resume", *BITS)
    assert "was made with another quantization; leave --resume out" in changed
    output.write_text("{}")
    assert "is no result of llmqat eval --tasks" in _fail(capsys, *argv, "--resume")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "--text: not given, and --tasks neither"),
        (("--text", "t", "--protocol", "chapter"), "--protocol: 'chapter' is not supported"),
        (("--tasks", "piqa", "--protocol", "word"), "--protocol: means nothing without --text"),
        (("--tasks", "piqa", "--max-tokens", "8"), "--max-tokens: means nothing without --text"),
        (("--text", "t", "--limit", "8"), "--limit: means nothing without --tasks"),
        (("--text", "t", "--tasks-dir", "d"), "--tasks-dir: means nothing without --tasks"),
        (("--tasks", "piqa", "--limit", "0"), "--limit: 0 is not supported"),
        (("--tasks", "piqa", "--shots", "-1"), "--shots: -1 is not supported"),
        (("--tasks", "piqa", "--resume"), "--resume: needs --output"),
        (("--tasks", "chess"), "--tasks: 'chess' is not supported; use zero-shot, all, boolq"),
        (("--tasks", "piqa", "--tasks-dir", "nowhere"), "--tasks-dir: nowhere is not a folder"),
        (("--text", "t", "--method", "magic"), "--method: 'magic' is not supported"),
        (("--text", "t", "--alpha", "0.5"), "--alpha: means nothing without --method"),
        (
            ("--text", "t", "--method", "rtn", "--calibration-seq-len", "8"),
            "--calibration-seq-len: means nothing to --method rtn",
        ),
        (("--text", "t", "--method", "gptq"), "--calibration: --method gptq looks at text"),
        (
            ("--text", "t", "--method", "gptq", "--calibration", "t", "--sequences", "0"),
            "--sequences: 0 is not supported",
        ),
        (("--text", "t", "--method", "rtn"), "--bits: not given; --method rtn needs"),
        (("--text", "t", "--rank", "2"), "--rank: means nothing without --method"),
        (("--text", "t", "--method", "awq", "--rank", "2"), "--rank: means nothing to --method"),
        (("--text", "t", "--method", "rtn", "--rank", "0"), "--rank: 0 is not supported"),
    ],
)
def test_bad_arguments_are_one_line(folder, capsys, argv, message):
    assert message in _fail(capsys, "--model", folder, *argv)


def test_scales_over_a_batch(folder, capsys):
    text = folder.parent / "text.txt"
    argv = ("--model", folder, "--text", text, "--seq-len", 32, "--bits", "4-4-16")
    group = ("--a-group-size", 16, "--a-group-axis")
    error = _fail(capsys, *argv, *group, "channel_over_tokens", "--batch-size", 2)
    assert "--batch-size: 2 would change the scales" in error
    per_token = _json(capsys, *argv, *group, "channel_per_token", "--batch-size", 2)
    assert per_token["perplexity"] > 1
