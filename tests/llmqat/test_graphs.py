"""The static decode step: what it needs of the host (nothing), of the cache (a slot for padding),
and of a device. Which tokens it gives is the subject of test_scheduler.py.
"""

from __future__ import annotations

import pytest
import torch

from llmqat.errors import ConfigError
from llmqat.runtime import Engine, Request, Sampling, run_requests
from llmqat.runtime.forward import OPERATORS
from llmqat.runtime.graphs import (
    FIELDS,
    DecodePlan,
    Row,
    StaticDecode,
    bucket_sizes,
    make_plan,
)
from llmqat.runtime.sampling import Sampler
from llmqat.runtime.transfer import download, upload
from llmqat_kernels import native, use_backend
from tests.llmqat.host_syncs import HostSync, no_host_syncs
from tests.llmqat.recorded import RecordedGraphs
from tests.llmqat.test_engine import quantized
from tests.llmqat.tiny import tiny_llama

PADDED = DecodePlan(padded=True)
NEED_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def static_of(engine, sampling=None):
    engine.static.configure(Sampler(sampling or Sampling(greedy=True), engine.device))
    return engine.static


def engine_of(setting="4-8-4", slots=6, plan=PADDED, **options):
    engine = Engine(quantized(tiny_llama(41), setting), max_slots=slots, max_len=16, **options)
    engine.replace_cache(max_len=16, plan=plan)
    return engine


def test_bucket_sizes():
    assert [bucket_sizes(n) for n in (1, 2, 3, 4, 5)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4, 5),
    ]  # fmt: skip
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 32, 64)
    assert bucket_sizes(100)[-3:] == (32, 64, 100)


def test_the_cache_has_a_slot_for_padding_only_where_there_can_be_any():
    slots = {n: PADDED.scratch_slots(n) for n in (1, 2, 3, 4, 5, 64)}
    assert slots == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 64: 1}
    assert DecodePlan().scratch_slots(64) == 0
    with use_backend("reference"):
        assert engine_of(slots=6).caches[0].k_codes.shape[0] == 7
        assert engine_of(slots=6, plan=DecodePlan()).caches[0].k_codes.shape[0] == 6
        assert engine_of(slots=2).caches[0].k_codes.shape[0] == 2


def test_which_plan_a_device_gets():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    kernels = dict.fromkeys((*OPERATORS, "sample"), "triton")
    assert make_plan(cpu, kernels, None) == make_plan(cpu, kernels, False) == DecodePlan()
    plan = make_plan(cuda, kernels, None)
    assert plan.padded and plan.lag == 1 and plan.capture is not None
    assert make_plan(cuda, kernels, False) == DecodePlan(lag=1)
    slow = kernels | {"attention_decode": "reference"}
    assert make_plan(cuda, slow, None) == DecodePlan(lag=1)
    with pytest.raises(ConfigError, match="attention_decode runs on the reference backend"):
        make_plan(cuda, slow, True)
    with pytest.raises(ConfigError, match="need a CUDA device"):
        engine_of(graphs=True)


def test_rows_without_a_sequence_leave_the_others_alone(backend):
    engine, small = engine_of(), engine_of(slots=3, plan=DecodePlan())
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    tokens = []
    for model in (engine, small):
        first = model.prefill([0, 1, 2], prompts).argmax(-1)
        rows = [
            Row(i, i, len(p), 0, int(t))
            for i, (p, t) in enumerate(zip(prompts, first, strict=True))
        ]
        static = static_of(model)
        static.load(rows)
        tokens.append([static.step().tolist() for _ in range(8)])
    assert tokens[0] == tokens[1] and len(tokens[0][0]) == 3
    padding = engine.static._state[:, 3]  # the fourth row of the bucket stays where it is
    assert padding[FIELDS.index("positions")] == 0 and padding[FIELDS.index("lengths")] == 1
    assert padding[FIELDS.index("slots")] == 6
    for wide, exact in zip(engine.caches, small.caches, strict=True):
        for name in ("k_codes", "v_codes", "k_scale", "v_scale"):
            padded = getattr(wide, name)
            assert torch.equal(padded[:3], getattr(exact, name))
            nothing = torch.ones if name.endswith("scale") else torch.zeros
            assert torch.equal(padded[3:6], nothing(padded[3:6].shape, dtype=padded.dtype))


def test_a_step_reads_nothing_but_its_buffers():
    """Between two steps nothing changes but the buffers, and those stay where they are."""
    engine = engine_of()
    static = static_of(engine, Sampling(seed=1))
    static.load([Row(2, 7, 0, 3, 5), Row(0, 8, 0, 0, 6)])
    state, at = static._state, static._state.data_ptr()
    static.step()
    static.step()
    assert state.data_ptr() == at
    fields = dict(zip(FIELDS, state, strict=True))
    assert fields["slots"][:2].tolist() == [2, 0] and fields["records"][:2].tolist() == [7, 8]
    assert fields["positions"][:2].tolist() == [2, 2] and fields["lengths"][:2].tolist() == [3, 3]
    static.load([Row(0, 8, 2, 0, source=1)])
    assert state[0, 0] == fields["tokens"][0] and fields["slots"][0] == 0


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(seed=2, top_k=5)], ids=str)
@pytest.mark.parametrize("setting", ["4-8-8", "16-16-16", "4-16-8"])
def test_nothing_waits_for_a_value(setting, sampling):
    if not native.is_available():
        pytest.skip(native.why_not())
    with use_backend("cpu"):
        engine = engine_of(setting, fuse=False)
        static = static_of(engine, sampling)
        with no_host_syncs() as guard:
            static.load([Row(i, i, 0, 0, 5) for i in range(3)])
            static.step()
            static.load([Row(2, 2, 1, 0, source=2)], [torch.tensor([4])])
            static.step()
        assert len(guard.seen) > 40


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: x.max().item(),
        lambda x: int(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: list(range(x[0])),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, x),
    ],
)
def test_the_guard_sees_a_wait(wait):
    x = torch.tensor([1, 2, 3])
    with pytest.raises(HostSync), no_host_syncs():
        wait(x)
    with no_host_syncs() as guard, guard.paused():
        wait(x)


def test_the_reference_backend_waits():
    with use_backend("reference"):
        static = static_of(engine_of())
        static.load([Row(0, 0, 0, 0, 5)])
        with pytest.raises(HostSync), no_host_syncs():
            static.step()


def test_a_recorded_body_keeps_what_python_decided():
    """The CPU's stand-in for a graph shows the errors that a graph would."""
    x = torch.tensor([1.0])
    replay, y = RecordedGraphs()(lambda: x * x.item(), lambda: None)
    x.fill_(3.0)
    replay()
    assert y.item() == 3.0  # and not 9
    replay, y = RecordedGraphs()(lambda: x * x, lambda: None)
    x.fill_(4.0)
    replay()
    assert y.item() == 16.0


def test_a_step_needs_its_settings():
    engine = engine_of()
    assert isinstance(engine.static, StaticDecode) and engine.static.captured == ()
    assert engine.plan == PADDED


def test_transfers_on_the_cpu():
    values = upload([[1, 2], [3, 4]], torch.int64, torch.device("cpu"))
    assert values.dtype == torch.int64
    read = download(values[0])
    values.zero_()
    assert read() == [1, 2]


# On a device


@pytest.fixture
def cuda_engines():
    """A graph engine and an eager one of the same model."""
    model = quantized(tiny_llama(42, heads=4, head_dim=64, intermediate=256), "4-8-8")
    model = model.to(device="cuda", dtype=torch.bfloat16)
    with use_backend("auto"):
        yield [Engine(model, max_slots=9, max_len=64, graphs=graphs) for graphs in (None, False)]


def cuda_outcome(engine, sampling, count=20):
    requests = [Request(i, tuple(range(1, 2 + i % 4)), 12 + 2 * i, i % 3) for i in range(count)]
    streams = {}
    done = {
        completion.request.record: (completion.tokens, completion.finish_reason)
        for together in run_requests(
            engine,
            requests,
            sampling,
            stop_ids=(3, 50, 90),
            on_token=lambda record, token: streams.setdefault(record, []).append(token),
        )
        for completion in together
    }
    return done, streams


@pytest.mark.gpu
@NEED_CUDA
@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(seed=3)], ids=str)
def test_cuda_graphs_give_the_tokens_of_eager_steps(cuda_engines, sampling):
    graphs, eager = cuda_engines
    assert graphs.plan.padded and graphs.plan.capture and graphs.plan.lag == eager.plan.lag == 1
    assert graphs.caches[0].k_codes.shape[0] == 10 and eager.caches[0].k_codes.shape[0] == 9
    # Buckets change the rows of the head's float product; without them the same kernels run.
    graphs.replace_cache(max_len=64, plan=DecodePlan(False, 1, graphs.plan.capture))
    expected = cuda_outcome(eager, sampling)
    for _ in range(2):
        assert cuda_outcome(graphs, sampling) == expected
    eager.replace_cache(max_len=64, plan=DecodePlan())
    assert cuda_outcome(eager, sampling) == expected


@pytest.mark.gpu
@NEED_CUDA
def test_cuda_buckets_pad_and_capture_once(cuda_engines):
    graphs, eager = cuda_engines
    eager.replace_cache(max_len=64, plan=DecodePlan(padded=True))
    sampling = Sampling(seed=4)
    assert cuda_outcome(graphs, sampling) == cuda_outcome(eager, sampling)
    captured = graphs.static.captured
    assert set(captured) <= {1, 2, 4, 8, 9} and 9 in captured
    before = torch.cuda.memory_allocated()
    cuda_outcome(graphs, sampling)
    assert graphs.static.captured == captured
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.gpu
@NEED_CUDA
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9])
def test_cuda_step_of_every_bucket(cuda_engines, rows):
    graphs, eager = cuda_engines
    eager.replace_cache(max_len=64, plan=DecodePlan(padded=True))
    tokens = []
    for engine in (graphs, eager):
        static = static_of(engine, Sampling(seed=5))
        static.load([Row(i, i, 0, 0, 5 + i) for i in range(rows)])
        tokens.append([static.step().tolist() for _ in range(6)])
    assert tokens[0] == tokens[1]
    for a, b in zip(graphs.caches, eager.caches, strict=True):
        assert torch.equal(a.k_codes[:rows], b.k_codes[:rows])


@pytest.mark.gpu
@NEED_CUDA
def test_cuda_steps_do_not_wait(cuda_engines):
    for engine in cuda_engines:
        static = static_of(engine, Sampling(seed=6))
        static.load([Row(i, i, 0, 0, 5) for i in range(3)])
        static.step()  # compiles and captures
        torch.cuda.set_sync_debug_mode("error")
        try:
            static.load([Row(i, i, 1, 0, source=i) for i in range(3)])
            read = download(static.step())
            static.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(read()) == 3
