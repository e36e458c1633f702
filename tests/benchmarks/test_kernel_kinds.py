"""Which forms prove which."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.kernel_kinds import uncovered
from llmqat_kernels.backends.triton.launch import Variant

NAMES = ("x", "weight", "bias", "columns")
KERNEL = SimpleNamespace(
    __name__="kernel",
    params=[SimpleNamespace(name=name, do_not_specialize=False) for name in NAMES],
)
FORM = Variant(
    "listed",
    KERNEL,
    {"x": "*bf16", "weight": "*fp32", "bias": "*bf16", "columns": "i32"},
    {"QMAX": 127, "HAS_TOTAL": True, "ROWS": 1, "WIDTH": 256, "CHUNKS": 4, "STEPS": 2, "WHOLE": 1}
    | {"HALF": 48, "HALF_BLOCK": 64, "PACKED": True},
)


def with_constants(**changed):
    return replace(FORM, constants={**FORM.constants, **changed})


@pytest.mark.parametrize(
    "launched",
    [
        FORM,
        with_constants(QMAX=7),
        with_constants(CHUNKS=3),
        with_constants(STEPS=9),
        with_constants(HALF=40),
        with_constants(HALF=30, HALF_BLOCK=32),
        replace(with_constants(bias=None), signature=FORM.signature | {"bias": "*fp32"}),
    ],
)
def test_proven(launched):
    assert uncovered([launched], [FORM]) == []


@pytest.mark.parametrize(
    "launched",
    [
        with_constants(QMAX=0),
        with_constants(CHUNKS=5),
        with_constants(STEPS=1),
        with_constants(HALF=41),
        with_constants(HALF=64),
        with_constants(HALF=80, HALF_BLOCK=128),
        with_constants(WIDTH=512),
        replace(FORM, aligned=False),
        replace(FORM, num_warps=8),
        replace(FORM, num_stages=1),
        replace(FORM, signature=FORM.signature | {"x": "*fp16"}),
        replace(FORM, signature=FORM.signature | {"weight": "*bf16"}),
        replace(FORM, signature=FORM.signature | {"columns": "i64"}),
    ],
)
def test_not_proven(launched):
    assert uncovered([launched], [FORM]) == [launched]
