"""The runner's bookkeeping, on commands that take no time."""

import json
import os
import re
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


def test_a_damaged_record_is_not_done(tmp_path, commands, capsys):
    cells = [cell(Stage(name, "eval", (("bits", name),)), i) for i, name in enumerate("ab")]
    run(tmp_path, cells)
    store = Store(tmp_path)
    path = store.path(cells[0].columns[COLUMN]) / RESULT
    for damage in ("{", "[]", '{"seconds": 1}', '{"seconds": "x", "result": 1, "command": 1}'):
        path.write_text(damage)
        capsys.readouterr()
        (broken,) = cells[0].stages
        assert store.is_damaged(broken) and not store.is_done(broken)
        assert not store.is_begun(broken)  # it was never half done: nobody has to decide anything
        summary = run(tmp_path, cells)
        assert (summary.failed, summary.stages) == ({}, 1)
        assert capsys.readouterr().err.splitlines() == [f"{path} is damaged; a runs again"]
        assert store.record(broken)["result"] == {"perplexity": 12.5}


def test_a_damaged_record_behind_a_result_is_made_again(tmp_path, commands):
    """A cell's record names all its stages."""
    made = Stage("smooth", "quantize", ())
    cells = [cell(Stage("a", "eval", (("model", made),), writes=False))]
    run(tmp_path, cells)
    (Store(tmp_path).path(made) / RESULT).write_text("{")
    assert run(tmp_path, cells).stages == 1
    assert commands == ["quantize", "eval", "quantize"]
    (record,) = read_cells(tmp_path)
    assert [stage["name"] for stage in record["stages"]] == ["smooth", "a"]


def test_an_unexpected_exception_is_a_failed_cell(tmp_path, commands, monkeypatch):
    """Whatever breaks in one cell, in its stage or when it is recorded."""
    names = ("stage", "record", "good", "launch")
    cells = [
        Cell(TABLE, TABLE.rows[i], None, 0, {COLUMN: Stage(name, "eval", (("bits", name),))})
        for i, name in enumerate(names)
    ]
    absent = Stage("launch", "train", (), launch=("no-such-launcher",))
    cells[3] = cell(Stage("launch", "eval", (("model", absent),)), 3)
    execute, write = Runner._execute, CellLog.write

    def fail_stage(runner, stage, *rest):
        if stage.name == "stage":
            raise RuntimeError("first line\nsecond")
        execute(runner, stage, *rest)

    def fail_record(log, each, *rest):
        if each is cells[1]:
            raise OSError("disk is full")
        return write(log, each, *rest)

    monkeypatch.setattr(Runner, "_execute", fail_stage)
    monkeypatch.setattr(CellLog, "write", fail_record)
    failed = run(tmp_path, cells).failed
    assert failed[cells[0].name] == "stage: RuntimeError: first line"
    assert failed[cells[1].name] == "its record: OSError: disk is full"
    assert failed[cells[3].name].startswith("launch: FileNotFoundError: ")
    assert len(failed) == 3
    status = {record["row"]: record["status"] for record in read_cells(tmp_path)}
    keys = [each.row.key for each in cells]
    assert status == {keys[0]: FAILED, keys[2]: DONE, keys[3]: FAILED}


def test_an_interruption_ends_the_run(tmp_path, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmqat.cli.main", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [cell(INFO)])
    assert list(read_cells(tmp_path)) == []


def test_without_a_terminal_every_cell_has_a_line(tmp_path, commands, capsys):
    cells = [cell(Stage(str(i), "eval", (("bits", str(i)),)), i) for i in range(2)]
    cells.append(cell(Stage("t", "train", ()), 2))
    Runner(tmp_path, cells, log(tmp_path), in_process=True).run()
    lines = capsys.readouterr().err.splitlines()
    first = (
        rf"\[1/3\] {re.escape(cells[0].name)} done; about \d+ s left and 1 stages of unknown length"
    )
    assert re.fullmatch(first, lines[0])
    assert lines[2].startswith(f"FAILED {cells[2].name}: ")
    assert lines[3] == f"[3/3] {cells[2].name} failed; nothing left"


def test_two_models_of_one_name_keep_their_records(tmp_path, commands):
    """Also where a second run of the first one follows."""
    done = cell(Stage("a", "eval", ()))
    for digest in ("d0", "d1", "d0", "d1"):
        logged = CellLog(tmp_path, "m", digest, "smoke", {})
        assert Runner(tmp_path, [done], logged, in_process=True, show_progress=False).run()
    records = list(read_cells(tmp_path))
    assert [(r["model"], r["model_sha256"]) for r in records] == [("m", "d0"), ("m", "d1")]
    io.remove(tmp_path / "cells" / "m" / "smoke" / "table2" / f"{done.name.partition('/')[2]}.json")
    logged = CellLog(tmp_path, "m", "d1", "smoke", {})
    Runner(tmp_path, [done], logged, in_process=True, show_progress=False).run()
    assert [r["model_sha256"] for r in read_cells(tmp_path)] == ["d1"]


def test_the_number_of_processes_is_recorded(tmp_path, commands, monkeypatch):
    def main(argv):
        print(json.dumps({"perplexity": 3.0, "processes": 2}))
        return 0

    monkeypatch.setattr("llmqat.cli.main", main)
    trained = Stage("t", "train", (), writes=False)
    run(tmp_path, [cell(Stage("a", "eval", (("model", trained),))), cell(INFO, 1)])
    assert {r["row"]: r["processes"] for r in read_cells(tmp_path)} == {
        TABLE.rows[0].key: 2, TABLE.rows[1].key: 1,
    }  # fmt: skip


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
