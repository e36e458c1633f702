"""The runner's bookkeeping, on commands that take no time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llmqat import io
from llmqat.commands.result import last_json
from llmqat.errors import LockError
from llmqat.experiments.cells import Cell
from llmqat.experiments.results import DONE, FAILED, CellLog, read_cells
from llmqat.experiments.runner import Runner, call_child, duration, error_line
from llmqat.experiments.stages import COMMAND, LOCK, LOG, OUTPUT, RESULT, Source, Stage, Store
from llmqat.experiments.tables import load_tables

TABLE = load_tables()["table2"]
COLUMN = "perplexity/wikitext2"
INFO = Stage("info", "info", (("json", True),), writes=False)


def cell(stage, row=0):
    return Cell(TABLE, TABLE.rows[row], None, 0, {COLUMN: stage})


def log(root):
    return CellLog(root, "m", "d0", "smoke", {})


def run(root, cells, monkeypatch=None, **options):
    return Runner(root, cells, log(root), in_process=True, show_progress=False, **options).run()


@pytest.fixture
def commands(monkeypatch):
    """Commands that print a perplexity, write a file or fail; the list of those that ran."""
    ran = []

    def main(argv):
        ran.append(argv[0])
        if argv[0] == "eval":
            print(json.dumps({"perplexity": 12.5}))
        elif argv[0] == "quantize":
            io.write_text(io.make_dir(argv[argv.index("--output") + 1]) / "model.txt", "x")
            print(json.dumps({"output": "there"}))
        else:
            print(f"llmqat {argv[0]}: --data: is empty", file=sys.stderr)
            return 1
        return 0

    monkeypatch.setattr("llmqat.cli.main", main)
    return ran


def test_a_chain_runs_once_and_is_recorded(tmp_path, commands):
    made = Stage("smooth", "quantize", (("method", "rtn"),))
    cells = [
        cell(Stage("a", "eval", (("model", made),), writes=False)),
        cell(Stage("b", "eval", (("model", made), ("bits", "4-8-8")), writes=False), 1),
    ]
    summary = run(tmp_path, cells)
    assert (summary.cells, summary.failed, summary.stages) == (2, {}, 3)
    assert commands == ["quantize", "eval", "eval"]
    records = list(read_cells(tmp_path))
    assert [r["status"] for r in records] == [DONE, DONE]
    assert records[0]["values"] == {COLUMN: 12.5}
    assert next(s["name"] for s in records[0]["stages"]) == "smooth"
    assert run(tmp_path, cells).stages == 0
    assert len(commands) == 3


def test_a_failing_cell_does_not_lose_the_others_and_turns_green(tmp_path, commands, monkeypatch):
    broken = Stage("train", "train", ())
    bad = cell(Stage("a", "eval", (("model", broken),), writes=False))
    good = cell(Stage("b", "eval", (), writes=False), 1)
    summary = run(tmp_path, [bad, good])
    assert summary.failed == {bad.name: "train: llmqat train: --data: is empty"}
    assert [r["status"] for r in read_cells(tmp_path)] == [FAILED, DONE]
    assert "is empty" in (Store(tmp_path).path(broken) / LOG).read_text()

    def main(argv):
        print(json.dumps({"perplexity": 3.0}))
        return 0

    monkeypatch.setattr("llmqat.cli.main", main)
    assert run(tmp_path, [bad, good]).failed == {}
    assert [r["status"] for r in read_cells(tmp_path)] == [DONE, DONE]


def test_a_stage_that_two_cells_need_fails_once(tmp_path, commands):
    broken = Stage("train", "train", ())
    cells = [
        cell(Stage(name, "eval", (("model", broken), ("bits", name)), writes=False), i)
        for i, name in enumerate(("a", "b"))
    ]
    assert len(run(tmp_path, cells).failed) == 2
    assert commands == ["train"]


def test_a_crash_and_a_wrong_option_are_failed_cells(tmp_path, monkeypatch):
    def main(argv):
        if argv[0] == "eval":
            raise KeyError("a bug")
        raise SystemExit(2)

    monkeypatch.setattr("llmqat.cli.main", main)
    cells = [cell(Stage("a", "eval", ())), cell(Stage("b", "quantize", ()), 1)]
    assert len(run(tmp_path, cells).failed) == 2


def test_a_deleted_output_is_made_again_only_if_it_is_read(tmp_path, commands):
    made = Stage("smooth", "quantize", ())
    first = cell(Stage("a", "eval", (("model", made),), writes=False))
    run(tmp_path, [first])
    (Store(tmp_path).output(made) / "model.txt").unlink()
    Store(tmp_path).output(made).rmdir()
    assert run(tmp_path, [first]).stages == 0
    second = cell(Stage("b", "eval", (("model", made), ("bits", "8-8-8")), writes=False), 1)
    assert run(tmp_path, [first, second]).stages == 2


def test_half_done_stages_go_on_or_begin_anew(tmp_path, commands):
    stage = Stage("q", "quantize", ())
    store = Store(tmp_path)
    left = io.make_dir(store.output(stage)) / "left.txt"
    io.write_text(left, "half")
    io.write_json(store.path(stage) / COMMAND, {})
    assert store.is_begun(stage)
    run(tmp_path, [cell(Stage("a", "eval", (("model", stage),), writes=False))])
    assert left.exists()
    io.remove(store.path(stage) / RESULT)
    run(
        tmp_path,
        [cell(Stage("b", "eval", (("model", stage), ("bits", "1")), writes=False))],
        restart=True,
    )
    assert not left.exists() and (store.path(stage) / OUTPUT / "model.txt").exists()


def test_a_stage_in_another_process_is_waited_for(tmp_path, commands):
    stage = Stage("a", "eval", (), writes=False)
    store = Store(tmp_path)
    lock = io.Lock(io.make_dir(store.path(stage)) / LOCK)
    lock.acquire()

    def finish():
        record = {"command": "c", "seconds": 1.0, "result": {"perplexity": 7.0}, "versions": {}}
        io.write_json(store.path(stage) / RESULT, record)
        lock.release()

    timer = threading.Timer(0.5, finish)
    timer.start()
    other = cell(Stage("b", "eval", (("bits", "2"),), writes=False), 1)
    assert run(tmp_path, [cell(stage), other]).failed == {}
    timer.join()
    assert commands == ["eval"]
    assert {r["values"][COLUMN] for r in read_cells(tmp_path)} == {7.0, 12.5}


RUNNER = """
import subprocess, sys
from llmqat import io
lock = io.Lock(sys.argv[1])
lock.acquire()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         pass_fds=(lock.fileno(),))
print(child.pid, flush=True)
child.wait()
"""


def test_the_child_of_a_killed_runner_holds_its_lock(tmp_path):
    path = tmp_path / LOCK
    words = [sys.executable, "-c", RUNNER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as runner:
        child = int(runner.stdout.readline())
        runner.kill()
    with pytest.raises(LockError), io.Lock(path):
        pass
    os.kill(child, signal.SIGKILL)
    for _ in range(100):
        try:
            with io.Lock(path):
                return
        except LockError:
            time.sleep(0.05)
    pytest.fail("the lock of a dead child is held")


def test_call_child_keeps_the_log(tmp_path):
    script = "import sys; print('{\"a\": 1}'); print('why', file=sys.stderr); sys.exit(3)"
    with io.Lock(tmp_path / LOCK) as lock:
        status, out, err = call_child([sys.executable, "-c", script], tmp_path / LOG, lock)
        assert (status, last_json(out), err) == (3, {"a": 1}, "why\n")
        call_child([sys.executable, "-c", script], tmp_path / LOG, lock)
    assert (tmp_path / LOG).read_text() == "why\nwhy\n"


def test_error_line():
    trace = "Traceback:\n  File x\nKeyError: 'a'\n"
    assert error_line(trace, 1) == "KeyError: 'a'"
    assert error_line("note\nllmqat train: --data: none\n", 1) == "llmqat train: --data: none"
    assert error_line("usage: x\nllmqat eval: error: unrecognized -x\n", 2).endswith("-x")
    assert error_line("", -9) == "ended with status -9 and no message"


def test_time_left_is_known_from_finished_stages(tmp_path, commands):
    cells = [cell(Stage(str(i), "eval", (("bits", str(i)),), writes=False), i) for i in range(3)]
    run(tmp_path, cells[:1])
    runner = Runner(tmp_path, cells, log(tmp_path), in_process=True, show_progress=False)
    seconds, unknown = runner.time_left()
    assert unknown == 0 and seconds >= 0
    trains = cell(Stage("t", "train", ()), 4)
    runner = Runner(tmp_path, [*cells, trains], log(tmp_path), in_process=True)
    assert runner.time_left()[1] == 1


def test_words():
    assert [duration(s) for s in (3, 200, 3900)] == ["3 s", "3 min", "1 h 05 min"]
    assert last_json("text\n{broken\n") is None
    assert Source.__name__ == "Source" and INFO.kind == "info "
