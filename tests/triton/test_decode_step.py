"""A decode step of Triton kernels: no value read on the host between them, and how many there are.
The wrappers run as they would on a device, on CPU tensors: what a device does with their launches
is the subject of tests/llmqat/test_graphs.py and of tests/device.
"""

import importlib
from collections import Counter
from contextlib import contextmanager

import pytest

from llmqat.runtime import Engine, Sampling
from llmqat.runtime.graphs import DecodePlan, Row
from llmqat.runtime.sampling import Sampler
from llmqat_kernels.backends import triton
from tests.conftest import select_backend
from tests.llmqat.host_syncs import no_host_syncs
from tests.llmqat.recorded import RecordedGraphs
from tests.llmqat.test_engine import quantized
from tests.llmqat.tiny import tiny_llama

NO_KERNEL = ("aten::empty", "aten::detach", "aten::alias", "aten::lift_fresh")
LAUNCHES_A_BLOCK = Counter(
    {
        "rms_norm_quantize_kernel": 2,
        "pair_matmul_kernel": 4,
        "rope_quantize_append_kernel": 1,
        "rope_kernel": 1,
        "attend_split_kernel": 1,
        "add_splits_kernel": 1,
        "quantize_kernel": 1,
        "silu_mul_quantize_kernel": 1,
    }
)
"""Twelve, and nothing else: docs/runtime.md."""


@pytest.fixture(autouse=True)
def on_triton():
    with select_backend("triton"):
        yield


@contextmanager
def no_kernels():
    """Within it launches give the names of their kernels, and run nothing: what these would write
    stays as it was allocated. Nothing may wait for a value.
    """
    names = []

    def note(kernel, *args, **options):
        names.append(kernel.fn.__name__)

    with pytest.MonkeyPatch.context() as monkeypatch, no_host_syncs() as guard:
        replace_launch(monkeypatch, lambda _: note)
        yield names, guard.seen


def replace_launch(monkeypatch, wrapped):
    """Put `wrapped(launch)` in the place of `launch` in every file of kernels."""
    for name in triton.MODULES:
        module = importlib.import_module(f"{triton.__name__}.{name}")
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", wrapped(module.launch))


def static_of(layers, mode="paper", setting="4-8-8", sampling=None, plan=None):
    model = quantized(tiny_llama(51, layers=layers, heads=2, kv_heads=1), setting, mode)
    engine = Engine(model, max_slots=4, max_len=16)
    assert set(engine.backends().values()) == {"triton"}
    engine.replace_cache(max_len=16, plan=plan or DecodePlan(padded=True))
    engine.static.configure(Sampler(sampling or Sampling(greedy=True), "cpu"))
    return engine.static


@pytest.mark.parametrize(
    "setting,mode",
    [("4-8-8", "paper"), ("4-8-4", "serving"), ("8-8-16", "paper"), ("16-16-16", "paper")],
)
@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(seed=1, top_k=5)], ids=str)
def test_nothing_waits_for_a_value(setting, mode, sampling):
    static = static_of(1, mode, setting, sampling)
    with no_kernels() as (names, _):
        for rows in (3, 4):
            static.load([Row(i, i, 0, 0, 5) for i in range(rows)])
            assert static.step().shape == (rows,)
    assert {"attend_split_kernel", "rope_quantize_append_kernel"} < set(names)


def test_launches_of_a_block():
    counts = []
    for layers in (2, 3):
        static = static_of(layers)
        static.load([Row(0, 0, 0, 0, 5)])
        with no_kernels() as (names, seen):
            static.step()
        others = [op.name() for op in seen if not op.is_view]
        counts.append((Counter(names), [op for op in others if not op.startswith(NO_KERNEL)]))
    (two, others_of_two), (three, others_of_three) = counts
    assert three - two == LAUNCHES_A_BLOCK and not two - three
    assert others_of_three == others_of_two
    assert sum(LAUNCHES_A_BLOCK.values()) == 12


def test_a_recorded_step_gives_the_same_tokens(monkeypatch):
    """The wrappers give a kernel no number that changes from step to step."""
    graphs, tokens = RecordedGraphs(), []
    replace_launch(monkeypatch, graphs.recorded)
    for plan in (DecodePlan(), DecodePlan(True, 0, graphs)):
        static = static_of(1, sampling=Sampling(seed=3), plan=plan)
        static.load([Row(0, 0, 0, 0, 5)])
        tokens.append([static.step().tolist() for _ in range(2)])
    assert tokens[0] == tokens[1]
