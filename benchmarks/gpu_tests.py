"""What became of every test on a GPU, as files: the plugin of pytest that `make test-gpu` loads.

    python -m pytest -p benchmarks.gpu_tests --gpu-results benchmarks/results ...

FOLDER/test_gpu.csv has a row a test (name, outcome, seconds, reason), written when the test ends,
so that a run that is killed keeps them. FOLDER/test_gpu.md is the summary: counts, failures, why
tests were skipped, the device, versions and commit; it is written at the end, and also when a run
is interrupted. Both replace those of the run before.
"""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

NAME = "test_gpu"
LONGEST = 300
"""Characters of a reason."""
ENDED = (0, 1, 5)
"""pytest's exit status where all tests ran: they passed, some failed, there were none."""
WHERE = ("processor", "torch", "triton", "cuda", "driver", "python", "commit", "date")


@dataclass
class Outcome:
    """One row: ``seconds`` of setup, call and teardown together."""

    test: str
    outcome: str = "passed"
    seconds: float = 0.0
    reason: str = ""

    def add(self, report: Any) -> None:
        """What one phase of the test says; a failure stays one."""
        self.seconds = round(self.seconds + report.duration, 3)
        if report.outcome == "passed" and not hasattr(report, "wasxfail"):
            return
        if self.outcome in ("failed", "error"):
            return
        self.outcome, self.reason = outcome_of(report), reason_of(report)


def outcome_of(report: Any) -> str:
    """``failed`` where the test itself does, ``error`` around it; otherwise as pytest calls it."""
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.outcome == "skipped" else "xpassed"
    if report.outcome == "failed" and getattr(report, "when", None) in ("setup", "teardown"):
        return "error"
    return str(report.outcome)


def reason_of(report: Any) -> str:
    """Why a test was skipped or failed, in one line."""
    found = report.longrepr
    crash = getattr(found, "reprcrash", None)
    if hasattr(report, "wasxfail"):
        text = report.wasxfail
    elif isinstance(found, (tuple, list)):  # file, line, reason
        text = found[-1].removeprefix("Skipped: ")
    elif crash is not None:
        text = crash.message
    else:  # a traceback as text
        text = str(found or "").strip().rpartition("\n")[2].removeprefix("E ")
    return " ".join(text.split())[:LONGEST]


def summary(rows: Sequence[Outcome], where: Mapping[str, Any], seconds: float, ended: bool) -> str:
    """The page."""
    counts = Counter(row.outcome for row in rows)
    counted = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no tests"
    place = ", ".join(f"{key} {where[key]}" for key in WHERE if where.get(key))
    lines = ["# Tests on a GPU", "", f"`make test-gpu`: {counted}, {seconds:.0f} s.", ""]
    if not ended:
        lines += ["**The run was interrupted: these are not all tests.**", ""]
    lines += [f"{place}.", ""]
    if not where.get("cuda"):
        lines += ["There was no CUDA device.", ""]
    wrong = [row for row in rows if row.outcome in ("failed", "error", "xpassed")]
    if wrong:
        lines += ["## Failures", "", *(f"- `{r.test}`: {r.reason or r.outcome}" for r in wrong), ""]
    reasons = Counter(row.reason for row in rows if row.outcome in ("skipped", "xfailed"))
    if reasons:
        lines += ["## Skipped", "", *(f"- {n}: {reason}" for reason, n in reasons.most_common())]
    return "\n".join(lines).rstrip() + "\n"


class Recorder:
    """Hears of every test in the process that the others report to."""

    def __init__(self, folder: Path) -> None:
        self._table, self._page = folder / f"{NAME}.csv", folder / f"{NAME}.md"
        self._begin = time.monotonic()
        self._running: dict[str, Outcome] = {}
        self.rows: list[Outcome] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._page.unlink(missing_ok=True)
        with self._table.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(f.name for f in fields(Outcome))

    def _done(self, row: Outcome) -> None:
        self.rows.append(row)
        with self._table.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(row))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test ended (or its process did, in none of the phases)."""
        row = self._running.setdefault(report.nodeid, Outcome(report.nodeid))
        row.add(report)
        if report.when not in ("setup", "call"):
            self._done(self._running.pop(report.nodeid))

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported, or skips itself."""
        if report.outcome != "passed":
            outcome = "error" if report.outcome == "failed" else report.outcome
            self._done(Outcome(report.nodeid, outcome, 0.0, reason_of(report)))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """The summary."""
        import torch

        from benchmarks.timing import environment, warn_without_commit

        gpu = torch.cuda.is_available()
        where = environment(torch.device("cuda" if gpu else "cpu"))
        warn_without_commit("cuda" if gpu else "cpu")
        seconds = time.monotonic() - self._begin
        self._page.write_text(summary(self.rows, where, seconds, int(exitstatus) in ENDED))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Where the files are."""
        terminalreporter.write_line(f"{self._table} and {self._page.name}: {len(self.rows)} tests")


def pytest_addoption(parser: Any) -> None:
    """The option of this plugin."""
    parser.addoption(
        "--gpu-results", type=Path, metavar="FOLDER", help=f"write {NAME}.csv and {NAME}.md here"
    )


def pytest_configure(config: Any) -> None:
    """Processes of pytest-xdist report to the one that writes."""
    folder = config.getoption("--gpu-results")
    if folder is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(folder), "gpu-results")
