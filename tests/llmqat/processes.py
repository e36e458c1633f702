"""Several processes of one training on this machine, forked from the tests' own: they start in no
time, because everything is imported already.
"""

import multiprocessing
import os
import socket
import traceback
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env

FSDP2 = Path(__file__).parents[2] / "configs" / "fsdp2.yaml"
TIMEOUT = 120
_context = multiprocessing.get_context("fork")


def fsdp2_environment(path=FSDP2):
    """What `accelerate launch --config_file path` tells its processes about FSDP."""
    options = ["--config_file", str(path), "--module", "llmqat.cli"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    environment = prepare_multi_gpu_env(arguments)
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")
    return {k: v for k, v in environment.items() if k in names or k.startswith("FSDP_")}


class Fork:
    """One process that runs `work(rank)`; leaving its `with` block kills it."""

    def __init__(self, work, rank, environment):
        self._receive, send = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_child, args=(work, rank, environment, send))
        self.process.start()
        send.close()

    @property
    def status(self):
        """The exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def result(self, timeout=TIMEOUT):
        """What `work` returned; None if it returned nothing, and the traceback if it raised."""
        try:
            value = self._receive.recv() if self._receive.poll(timeout) else None
        except EOFError:  # killed
            value = None
        self.wait(timeout)
        return value

    def wait(self, timeout=TIMEOUT):
        """The exit status; a process that is still running then is killed."""
        self.process.join(timeout)
        if self.status is None:
            self.process.kill()
            self.process.join()
        return self.status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait(0)
        self.process.close()


def fork(work):
    """`work(0)` in a process of its own."""
    return Fork(work, 0, {})


def launch(work, count=2, environment=None):
    """Run `work(rank)` in `count` processes; returns [(exit status, what it returned)] by rank.

    A process that raises ends with status 1, and what it returned is the traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    started = []
    for rank in range(count):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        own = {name: str(value) for name, value in own.items()}
        started.append(Fork(work, rank, {**own, "OMP_NUM_THREADS": "1", **(environment or {})}))
    results = [(process.result(), process.status) for process in started]
    return [(status, value) for value, status in results]


def _child(work, rank, environment, send):
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # the tests' own process is alone
    status = 1
    try:
        send.send(work(rank))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        send.send(traceback.format_exc())
    finally:
        os._exit(status)
