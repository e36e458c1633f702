"""Launches that overlap (LLMQAT_PDL): every kernel waits for those before it, before it touches
memory. The emulator takes the memory of the tests away until all threads of a block have waited.
"""

import ctypes

import numpy as np
import pytest
import torch

pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

from tests.emulator.build import FAST, SCHEDULES, EmulatorError, Kernels, compile_library
from tests.emulator.memory import guard
from tests.emulator.test_emulator import SOURCE
from tests.kernels import cuda_emulated
from tests.kernels.cuda_calls import assert_agrees
from tests.kernels.cuda_cases import CASES, cases

pytestmark = pytest.mark.emulator


@pytest.fixture
def faults():
    library = Kernels(compile_library(SOURCE, [*FAST, "-O0", "-DLLMQAT_EMULATED_ARCH=80"]))
    library.turns.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.exchange.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.hide_memory()
    yield library
    library.hide_memory(False)
    library.use_schedule("forward")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "late, message",
    [
        (1, r"global memory before griddepcontrol_wait in block \(\d, 0, 0\), thread"),
        (2, r"never waits for the launches before its own in block \(\d, 0, 0\), thread \(63, 0"),
        (4, r"griddepcontrol_wait that some threads come to too late: at sync_block .*\(0, 0, 0\)"),
    ],
)
def test_a_kernel_out_of_turn(faults, schedule, late, message):
    faults.use_schedule(schedule)
    memory = guard(torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(EmulatorError, match=message):
        faults.turns(late, memory.pointer)
    assert faults.turns(0, memory.pointer) == 0  # as if nothing had been
    assert memory.check().sum() == 0


def test_only_a_kernel_that_never_waits_is_found_without_hiding(faults):
    faults.hide_memory(False)
    memory = guard(torch.zeros(16, dtype=torch.uint8))
    for late in (0, 1):
        assert faults.turns(late, memory.pointer) == 0
    with pytest.raises(EmulatorError, match="never waits"):
        faults.turns(2, memory.pointer)


def test_a_wait_is_no_barrier(faults):
    """What lacks its barriers still shows: threads go on in the order of the schedule."""
    out = np.zeros(64, np.int32)
    partner = (np.arange(64) + 32) % 64
    want = partner[np.arange(64) ^ 1] + 100 + partner * 1000
    right = []
    for name in SCHEDULES:
        faults.use_schedule(name)
        assert faults.exchange(0, out.ctypes.data) == 0
        right.append(np.array_equal(out, want))
    assert not all(right)


@pytest.mark.parametrize("op", CASES)
def test_kernels_wait_before_they_touch_memory(op):
    small = [case for case in cases(op, "cpu", small=True) if case.args[0].numel()]
    with cuda_emulated.hidden_memory():
        for case in small[:: max(1, len(small) // 4)]:
            assert_agrees(op, case, cuda_emulated.run(op, case))
