"""The tiles' sweep as on a GPU: graphs of cold copies, on a machine that has none."""

import json
import subprocess
import sys

import pytest
import torch

from tests.twin.test_twin import device  # noqa: F401


@pytest.mark.triton
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch was built with CUDA")
def test_tiles_are_timed_by_graphs(device):  # noqa: F811
    """Every candidate is captured, replayed and gives the bits of the default."""
    command = [sys.executable, "-m", "tests.benchmarks.twin_sweep", str(device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, found = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.endswith(" (graph)") for line in lines)
    found = json.loads(found)
    assert found["buckets"].keys() == {"repacked_matmul", "integer_group_matmul"}
    for bucket in found["buckets"].values():
        assert bucket["cases"] == 1 and bucket["timed"] > 0 and not bucket["refused"]
    assert found["replays"] > 0
