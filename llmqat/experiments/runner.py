"""Runs cells: every missing stage once, whatever fails, however often it is killed.

A stage's folder holds ``command.json`` once it was begun, ``result.json`` once it is done,
``log.txt`` (all its stderr) and ``output/``. A lock per stage lets several processes share one
folder: a stage that another one holds is left for later. A stage runs as a child process that
inherits the lock, so that a killed runner's child is not disturbed by the next run; or in this
process, where start-up would take longer than the work.
"""

from __future__ import annotations

import contextlib
import gc
import io as std_io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llmqat import __version__, io
from llmqat.commands.result import last_json
from llmqat.errors import LockError
from llmqat.experiments.cells import Cell, by_need
from llmqat.experiments.results import CellLog
from llmqat.experiments.stages import COMMAND, LOCK, LOG, OUTPUT, RESULT, Stage, Store

_POLL_SECONDS = (0.2, 5.0)
"""How often a stage in another process is looked at: at first, and at most."""


class Busy(Exception):
    """Another live process works on the stage."""


class StageFailed(Exception):
    """A stage's command failed; the text is its error line."""


@dataclass
class Summary:
    """What a run did."""

    cells: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stages: int = 0
    seconds: float = 0.0


def call_here(argv: Sequence[str]) -> tuple[int, str, str]:
    """Run ``llmqat`` with ``argv`` in this process: status, stdout, stderr."""
    from llmqat import cli

    out, err = std_io.StringIO(), std_io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(list(argv))
        except SystemExit as error:  # argparse ends like this on an unknown option
            status = error.code if isinstance(error.code, int) else 1
        except Exception:  # a child's crash would not end the run either; the log keeps its trace
            status = 1
            traceback.print_exc()
    return status, out.getvalue(), err.getvalue()


def call_child(words: Sequence[str], log: Path, lock: io.Lock) -> tuple[int, str, str]:
    """Run a command as a child: status, stdout, end of stderr. Its stderr is appended to ``log``
    as it comes.
    """
    with log.open("ab") as errors:
        begin = errors.tell()
        process = subprocess.run(
            list(words),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
            pass_fds=(lock.fileno(),),
        )
    with log.open("rb") as errors:
        errors.seek(begin)
        text = errors.read().decode("utf-8", "replace")
    return process.returncode, process.stdout, text


def error_line(stderr: str, status: int) -> str:
    """The line of a command's stderr that says why it failed."""
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("llmqat ") and "error:" in line]
    named = named or [line for line in lines if line.startswith("llmqat ")]
    last = (named or lines or [""])[-1]
    return last or f"ended with status {status} and no message"


def described(error: Exception) -> str:
    """The class and the first line of an exception that nobody expected."""
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Runner:
    """Runs cells into a folder.

    Args:
        root: the output folder.
        cells: what to run.
        in_process: run stages in this process.
        restart: begin half-done stages anew instead of going on.
        show_progress: draw a bar on stderr, where that is a terminal; elsewhere a line per finished
            stage, or per finished cell where stages run in this process.
    """

    def __init__(
        self,
        root: Path,
        cells: Sequence[Cell],
        log: CellLog,
        *,
        in_process: bool,
        restart: bool = False,
        show_progress: bool = True,
    ) -> None:
        self.store = Store(root)
        self.cells = by_need(cells)
        self.log = log
        self.in_process = in_process
        self.restart = restart
        self._failed: dict[str, str] = {}
        self._times: dict[str, list[float]] = {}
        self._todo = self._missing_stages()
        self._restarted: set[str] = set()
        self._executed = 0
        self._settled = 0
        self._bar = tqdm(
            total=len(self._todo), unit="stage", disable=None if show_progress else True,
            bar_format="{n_fmt}/{total_fmt} stages |{bar:20}| {elapsed}, {postfix}",
        )  # fmt: skip
        # Stages in other processes are minutes: each has its line. Those here are seconds, and
        # without a terminal there is no bar either.
        self._shows_cells = in_process and show_progress and bool(self._bar.disable)

    def _missing_stages(self) -> dict[str, Stage]:
        """Stages that must still run, by hash; times of the others feed the estimate."""
        todo: dict[str, Stage] = {}

        def visit(stage: Stage, output: bool) -> None:
            if stage.hash in todo:
                return
            if self.store.is_done(stage):
                self._note_time(stage, float(self.store.record(stage)["seconds"]))
            if self._is_ready(stage, output):
                return
            for needed in stage.needs:
                visit(needed, output=True)
            todo[stage.hash] = stage

        for cell in self.cells:
            for stage in cell.columns.values():
                for damaged in self.store.damaged(stage):
                    visit(damaged, output=False)
                visit(stage, output=False)
        return todo

    def _is_needed_again(self, stage: Stage) -> bool:
        return stage.writes and not self.store.output(stage).exists()

    def _note_time(self, stage: Stage, seconds: float) -> None:
        self._times.setdefault(stage.kind, []).append(seconds)

    def time_left(self) -> tuple[float, int]:
        """Seconds for the stages of known kinds, by those that finished, and how many others."""
        known, unknown = 0.0, 0
        for stage in self._todo.values():
            times = self._times.get(stage.kind)
            if times:
                known += sum(times) / len(times)
            else:
                unknown += 1
        return known, unknown

    def run(self) -> Summary:
        """Run everything that is missing. Never raises for a cell that fails."""
        summary, started = Summary(cells=len(self.cells)), time.monotonic()
        frozen = gc.get_freeze_count()  # by the program, or by who called it
        pending, pause = list(self.cells), _POLL_SECONDS[0]
        with self._bar:
            while pending:
                waiting, count = [], len(self._todo)
                for cell in pending:
                    if not self._run_cell(cell, summary):
                        waiting.append(cell)
                if waiting and len(waiting) == len(pending) and count == len(self._todo):
                    self._show("waiting for another process")
                    time.sleep(pause)
                    pause = min(2 * pause, _POLL_SECONDS[1])
                else:
                    pause = _POLL_SECONDS[0]
                pending = waiting
        if not frozen:
            gc.unfreeze()
        summary.stages = self._executed
        summary.seconds = time.monotonic() - started
        return summary

    def _run_cell(self, cell: Cell, summary: Summary) -> bool:
        """Whether the cell is settled: done or failed, not waiting for another process."""
        results: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for column, stage in cell.columns.items():
            try:
                for damaged in self.store.damaged(stage):
                    self._require(damaged)
                results[column] = self._require(stage)["result"]
            except Busy:
                return False
            except StageFailed as error:
                errors[column] = str(error)
        try:
            problems = self.log.write(cell, self.store, results, errors)
        except Exception as error:  # such as a full disk; the other cells may still have room
            problems = f"its record: {described(error)}"
        self._settled += 1
        if problems:
            summary.failed[cell.name] = problems
            tqdm.write(f"FAILED {cell.name}: {problems}", file=sys.stderr)
        if self._shows_cells:
            count = f"[{self._settled}/{len(self.cells)}]"
            state = "failed" if problems else "done"
            tqdm.write(f"{count} {cell.name} {state}; {self._left()}", file=sys.stderr)
        return True

    def _require(self, stage: Stage, output: bool = False) -> dict[str, Any]:
        """The record of a stage, which is run if need be.

        Args:
            output: its folder must be there too, not only its result.

        Raises:
            Busy: another process runs it. StageFailed: it, or one that it needs, fails, for
            whatever reason.
        """
        if self._is_ready(stage, output):
            self._todo.pop(stage.hash, None)
            return self.store.record(stage)
        if stage.hash in self._failed:
            raise StageFailed(self._failed[stage.hash])
        try:
            for needed in stage.needs:
                self._require(needed, output=True)
            return self._run_stage(stage, output)
        except Busy:
            raise
        except StageFailed as error:
            self._give_up(stage, error)
            raise
        except Exception as error:
            failure = StageFailed(f"{stage.name}: {described(error)}")
            self._give_up(stage, failure)
            raise failure from error

    def _give_up(self, stage: Stage, why: StageFailed) -> None:
        self._failed[stage.hash] = str(why)
        self._drop(stage)

    def _is_ready(self, stage: Stage, output: bool) -> bool:
        return self.store.is_done(stage) and not (output and self._is_needed_again(stage))

    def _run_stage(self, stage: Stage, output: bool) -> dict[str, Any]:
        folder = io.make_dir(self.store.path(stage))
        lock = io.Lock(folder / LOCK)
        try:
            lock.acquire()
        except LockError as error:
            raise Busy from error
        with contextlib.closing(_Release(lock)):
            if not self._is_ready(stage, output):  # another process may have ended it meanwhile
                self._execute(stage, folder, lock)
            self._drop(stage)
            return self.store.record(stage)

    def _execute(self, stage: Stage, folder: Path, lock: io.Lock) -> None:
        if self.store.is_damaged(stage):
            text = f"{folder / RESULT} is damaged; {stage.name} runs again"
            tqdm.write(text, file=sys.stderr)
            io.remove(folder / RESULT)
        if self.restart and self.store.is_begun(stage) and stage.hash not in self._restarted:
            for path in (folder / OUTPUT, folder / f".{OUTPUT}.quantize"):
                shutil.rmtree(path, ignore_errors=not path.exists())
        self._restarted.add(stage.hash)
        shown = self.store.shown(stage)
        io.write_json(folder / COMMAND, {"command": shown, "hash": stage.hash})
        self._show(stage.name)
        started = time.monotonic()
        if self.in_process and not stage.launch:
            status, out, err = call_here(self.store.argv(stage))
            if stage.kind not in self._times:
                # What a command imports stays: looking through it at every collection of every
                # training run took longer than the training.
                gc.collect()
                gc.freeze()
            if status:
                io.write_text(folder / LOG, err)
        else:
            status, out, err = call_child(self._words(stage), folder / LOG, lock)
        seconds = time.monotonic() - started
        if status:
            raise StageFailed(f"{stage.name}: {error_line(err, status)}")
        record = {
            "name": stage.name,
            "hash": stage.hash,
            "command": shown,
            "seconds": round(seconds, 3),
            "result": self._result(stage, out),
            "versions": versions(),
        }
        for path in (folder / OUTPUT).glob("checkpoint-*"):  # a finished run is never resumed
            shutil.rmtree(path)
        io.write_json(folder / RESULT, record)
        self._executed += 1
        self._note_time(stage, seconds)
        self._drop(stage)
        if not self.in_process:
            tqdm.write(f"{seconds:7.0f} s  {stage.name}; {self._left()}", file=sys.stderr)

    def _words(self, stage: Stage) -> list[str]:
        start = list(stage.launch) if stage.launch else [sys.executable]
        return [*start, "-m", "llmqat.cli", *self.store.argv(stage)]

    def _result(self, stage: Stage, out: str) -> Any:
        found = last_json(out)
        if found is None and stage.command == "train":
            from llmqat.train.run import RUN_FILE

            path = self.store.output(stage) / RUN_FILE
            found = json.loads(path.read_text(encoding="utf-8"))
        if found is None:
            raise StageFailed(f"{stage.name}: the command printed no result")
        return found

    def _drop(self, stage: Stage) -> None:
        if self._todo.pop(stage.hash, None) is not None:
            self._bar.update()

    def _left(self) -> str:
        seconds, unknown = self.time_left()
        if not seconds:
            return "time left unknown" if unknown else "nothing left"
        more = f" and {unknown} stages of unknown length" if unknown else ""
        return f"about {duration(seconds)} left{more}"

    def _show(self, text: str) -> None:
        self._bar.set_postfix_str(f"{self._left()}; {text}")


class _Release:
    """Releases a lock when closed (``io.Lock`` as a context manager would acquire it again)."""

    def __init__(self, lock: io.Lock) -> None:
        self._lock = lock

    def close(self) -> None:
        self._lock.release()


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min`` or ``12 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def versions() -> dict[str, str]:
    """What ran."""
    return {
        "llmqat": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "cpus": str(os.cpu_count()),
    }
