"""llmqat/io.py: whole files or none, in the right order, one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llmqat import io
from llmqat.errors import CheckpointError, ConfigError, DataError, LockError
from tests.llmqat.file_faults import STEPS, Faults


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_errors_are_value_errors() -> None:
    for kind in (ConfigError, CheckpointError, DataError, LockError):
        assert issubclass(kind, ValueError)


def test_modules_need_no_torch() -> None:
    code = (
        "import sys, llmqat.io, llmqat.errors, llmqat.data, llmqat.data.store, llmqat.data.reader;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    io.write_bytes(path, b"one")
    io.write_bytes(path, b"two" * 100_000)
    io.write_text(tmp_path / "b.txt", "Grüße\n")
    io.write_json(tmp_path / "c.json", {"x": [1, 2.5, None], "é": "ü"})
    assert path.read_bytes() == b"two" * 100_000
    assert (tmp_path / "b.txt").read_text() == "Grüße\n"
    assert json.loads((tmp_path / "c.json").read_text()) == {"x": [1, 2.5, None], "é": "ü"}
    assert io.sha256_file(path) == hashlib.sha256(b"two" * 100_000).hexdigest()
    assert names(tmp_path) == ["a.bin", "b.txt", "c.json"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        io.write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    io.write_bytes(tmp_path / "a", bytes(range(256)))
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == bytes(range(256))


def test_nan_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        io.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []


def test_exception_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    io.write_bytes(path, b"old")
    for manager in (io.atomic_write, io.atomic_path):
        with pytest.raises(KeyError), manager(path):
            raise KeyError("stop")
        assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_atomic_path_syncs_a_foreign_writer(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with Faults() as faults, io.atomic_path(path) as temp:
        assert temp.parent == tmp_path and temp != path
        temp.write_bytes(b"new")
    assert [step for step, _ in faults.trace] == ["fsync", "replace", "fsync"]
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_order_of_steps(tmp_path: Path) -> None:
    with Faults() as faults:
        io.write_bytes(tmp_path / "a", b"x")
    (open_, temp), (write, _), (sync, synced), (replace, target), (last, folder) = faults.trace
    assert (open_, write, sync, replace, last) == ("open", "write", "fsync", "replace", "fsync")
    assert synced == temp and Path(temp).parent == tmp_path
    assert target == str(tmp_path / "a") and folder == str(tmp_path)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_failing_step_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    path = tmp_path / "a"
    io.write_bytes(path, b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError) as caught:
            io.write_bytes(path, b"new")
    assert caught.value.errno == code and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PermissionError) == (code == errno.EACCES)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_file_size_limit_of_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "a"
    io.write_bytes(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            io.write_bytes(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_missing_folder_and_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(OSError, match=r"x\.bin"):
            io.write_bytes(folder / "x.bin", b"")
    with pytest.raises(NotADirectoryError, match="file"):
        io.make_dir(tmp_path / "file" / "sub")
    with pytest.raises(NotADirectoryError, match="file"):
        io.make_dir(tmp_path / "file")


def test_folder_without_permission() -> None:
    """In a child that gives up root, for root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        pid = os.fork()
        if pid == 0:
            refused = 0
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                io.write_bytes(folder / "a.bin", b"")
            except PermissionError as error:
                refused += str(folder / "a.bin") in str(error)
            try:
                io.Lock(folder / ".lock").acquire()
            except PermissionError as error:
                refused += str(folder / ".lock") in str(error)
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        folder.chmod(0o755)


def test_make_dir_syncs_each_parent(tmp_path: Path) -> None:
    with Faults() as faults:
        assert io.make_dir(tmp_path / "a" / "b").is_dir()
        io.make_dir(tmp_path / "a" / "b")
    assert faults.trace == [("fsync", str(tmp_path)), ("fsync", str(tmp_path / "a"))]


def test_remove_and_remove_temps(tmp_path: Path) -> None:
    io.write_bytes(tmp_path / "a", b"")
    io.remove(tmp_path / "a")
    io.remove(tmp_path / "a")
    for name in (".x.tmp-01234567", ".y.tmp-01234567", "z.tmp-01234567", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    assert io.remove_temps(tmp_path, lambda name: name == "x") == ["x"]
    assert io.remove_temps(tmp_path) == ["y"]
    assert names(tmp_path) == [".hidden", "z.tmp-01234567"]


def test_second_lock_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with io.Lock(path) as lock:
        assert lock.held and path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(LockError, match=str(os.getpid())) as caught:
            io.Lock(path).acquire()
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(LockError, match="already"):
            lock.acquire()
    assert not lock.held and names(tmp_path) == []
    lock.release()
    with lock:
        assert lock.held


def test_stale_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = (
        "import sys, time; from llmqat.io import Lock; Lock(sys.argv[1]).acquire();"
        "print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(LockError, match=f"process {process.pid} "):
        io.Lock(path).acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_text() == f"{process.pid}\n"  # the dead holder's file is still there
    with io.Lock(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_stale_lock_whose_pid_lives_again(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("1\n")  # pid 1 lives, but it does not hold this lock
    with io.Lock(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_forked_child_does_not_free_its_parents_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with io.Lock(path) as lock:
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(LockError):
            io.Lock(path).acquire()


def test_lock_under_contention(tmp_path: Path) -> None:
    """Four processes add to a counter under the lock, which unlinks its file on every release."""
    path, counter = tmp_path / ".lock", tmp_path / "counter"
    counter.write_text("0")
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            done = 0
            while done < 50:
                try:
                    with io.Lock(path):
                        counter.write_text(str(int(counter.read_text()) + 1))
                        done += 1
                except LockError:
                    time.sleep(0.0005)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert counter.read_text() == "200"


def test_faults_put_the_real_functions_back() -> None:
    before = {name: getattr(os, name) for name in STEPS}
    with Faults():
        assert os.write is not before["write"]
    assert {name: getattr(os, name) for name in STEPS} == before


def test_the_descriptor_of_a_lock_is_known_while_it_is_held(tmp_path):
    lock = io.Lock(tmp_path / ".lock")
    with lock:
        assert os.path.samestat(os.fstat(lock.fileno()), os.stat(tmp_path / ".lock"))
    with pytest.raises(LockError, match="not held"):
        lock.fileno()
