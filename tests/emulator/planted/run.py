"""Plants one bug after another and says which ones their tests catch.

``python -m tests.emulator.planted.run [NAME ...]`` prints a JSON line for each bug: its name, how
long it took and the first line of the failure, or null if the tests passed. The lines named
``sound: ...`` are the sources as they are, under the same tests.

What the tests import is imported once; every bug gets a fork of this process, so that neither a
crash nor a library that stays loaded reaches the next one.
"""

import io
import json
import os
import re
import resource
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.emulator.build import ROOT, precompiled
from tests.emulator.planted.bugs import BUGS, Bug

# -O0 halves the time of a compilation, which is most of the time of a bug.
FLAGS = (
    "-O0 -fsanitize=alignment,bounds,shift,signed-integer-overflow"
    " -fsanitize-undefined-trap-on-error"
).split()
SOURCES = ("csrc/cuda", "csrc/include", "tests/emulator")
CPU_SECONDS = 60  # a bug may also be an endless loop


def plant(bug: Bug, tree: Path) -> None:
    """Copy the sources into ``tree`` and change one of them."""
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.py*"))
    path = tree / bug.file
    source = path.read_text()
    if source.count(bug.text) != 1:
        raise ValueError(f"{bug.file} does not hold the text of {bug.name!r} exactly once")
    path.write_text(source.replace(bug.text, bug.replacement))


def sound(bugs: Sequence[Bug]) -> list[Bug]:
    """For every short check among ``bugs``, one that changes nothing."""
    checks = dict.fromkeys(bug.tests for bug in bugs)
    return [Bug(f"sound: {' '.join(tests)}", bugs[0].file, "", "", tests) for tests in checks]


def first_failure(tests: tuple[str, str]) -> str | None:
    """Run them here; the line of pytest that says what failed, or None."""
    file, selection = tests
    output = io.StringIO()
    arguments = ["-xqs", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu"]
    with redirect_stdout(output), redirect_stderr(output):
        code = pytest.main([*arguments, "-k", selection, str(ROOT / "tests/emulator" / file)])
    if code == pytest.ExitCode.OK:
        return None
    if code != pytest.ExitCode.TESTS_FAILED:
        raise RuntimeError(f"pytest ended with {code}:\n{output.getvalue()}")
    errors = re.findall(r"^E +(.+)$", output.getvalue(), re.MULTILINE)
    return errors[0] if errors else output.getvalue()[-500:]


def in_a_fork(bug: Bug) -> dict[str, object]:
    """What became of one bug, found out by a child process."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree, answer, report = (Path(folder) / name for name in ("tree", "answer.json", "report"))
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), sys.__stderr__.fileno())
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
                if bug.text:  # checks without a bug share the libraries of the sources themselves
                    plant(bug, tree)
                    os.environ["LLMQAT_EMULATOR_TREE"] = str(tree)
                answer.write_text(json.dumps({"failure": first_failure(bug.tests)}))
            except BaseException:
                answer.write_text(json.dumps({"error": traceback.format_exc()}))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if answer.is_file():
            result = json.loads(answer.read_text())
        else:
            said = report.read_text(errors="replace")[-6000:]
            result = {"error": f"a crash, or more than {CPU_SECONDS} s\n{said}"}
    return {"name": bug.name, "seconds": round(time.monotonic() - begin, 1), **result}


def run(bugs: Sequence[Bug], flags: Sequence[str]) -> None:
    """Print what becomes of each under these flags of the compiler."""
    # Collecting imports what the tests need, before the forks.
    files = sorted({str(ROOT / "tests/emulator" / bug.tests[0]) for bug in bugs})
    with redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files])
    os.environ["LLMQAT_EMULATOR_FLAGS"] = shlex.join(flags)
    for bug in bugs:
        print(json.dumps(in_a_fork(bug)), flush=True)


def main(names: Sequence[str]) -> None:
    bugs = [bug for bug in BUGS if not names or bug.name in names]
    run([*sound(bugs), *bugs], precompiled(FLAGS))


if __name__ == "__main__":
    main(sys.argv[1:])
