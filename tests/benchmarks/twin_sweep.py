"""The tiles' sweep on the device of tests/twin: captured on copies of the inputs, and replayed.

    python -m tests.benchmarks.twin_sweep DEVICE.so

Prints a line of JSON: what became of each bucket, and how many graphs were replayed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

if __name__ == "__main__":  # before torch looks for a device
    os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ctypes.CDLL(sys.argv[1])

import torch

from benchmarks import cuda, tune
from benchmarks.entry import Shape
from benchmarks.registry import ENTRIES, Case
from llmqat_kernels import use_backend
from tests.twin import cuda as twin
from tests.twin import graphs, tensors

SIZES = Shape("small", {"M": 2, "N": 64, "K": 256})
OPERATORS = ("repacked_matmul", "integer_group_matmul")


def swept():
    """Every bucket of one small case of each operator."""
    last = [[entry for entry in ENTRIES if entry.op == op][-1] for op in OPERATORS]
    chosen = [Case(entry, SIZES, torch.bfloat16) for entry in last]
    choices = {op: candidates[-2:] for op, candidates in tune.candidates(90).items()}
    with tensors.device(), use_backend("triton"):
        buckets, failed = tune.sweep(
            chosen, tensors.CUDA, choices, cuda.times, 1, lambda found: None
        )
    assert not failed
    return {
        op: {
            "cases": len(bucket.default_us),
            "timed": len(bucket.ratios),
            "refused": list(bucket.refused.values()),
        }
        for (op, _), bucket in buckets.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    twin.install()
    cuda.MAX_COPIES, cuda.SAMPLE_SECONDS = 2, 1e-3  # the interpreter is slow
    print(json.dumps({"buckets": swept(), "replays": graphs.TAPE.replays}))
