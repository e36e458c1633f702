"""The committed golden vectors: what `lq-1` means must never change silently."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from llmqat_kernels.testing import assert_same_bits
from tests.golden.make import CASES, PATH, run_case

SHA256 = "05d113c870969ff5fde7565c909d3d8a389f123d7666f36a1d867c1e61f0dd26"
STORED = load_file(PATH)
INPUTS = {name.removeprefix("in/"): t for name, t in STORED.items() if name.startswith("in/")}
OPERATORS = {op: getattr(torch.ops.llmqat, op) for op, _ in CASES.values()}


def test_file_is_the_committed_one():
    assert hashlib.sha256(PATH.read_bytes()).hexdigest() == SHA256


def test_every_output_is_covered():
    assert {k.split("/")[1] for k in STORED if k.startswith("out/")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_backends_reproduce_the_golden_vectors(backend, name):
    for index, out in enumerate(run_case(name, INPUTS, OPERATORS)):
        assert_same_bits(out, STORED[f"out/{name}/{index}"], f"{name}[{index}]")
