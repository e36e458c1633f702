"""Continuous slots: the same tokens, ends and streams whatever the slots, the lag, the buckets and
the graphs, and the same as one sequence alone.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from llmqat.runtime import Engine, Request, Sampling, run_requests
from llmqat.runtime.graphs import DecodePlan
from llmqat.runtime.sampling import NO_TOKEN, Sampler
from llmqat_kernels import native, use_backend
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.recorded import RecordedGraphs
from tests.llmqat.test_engine import quantized
from tests.llmqat.tiny import tiny_llama

MAX_LEN = 24
STOPS = (3, 17, 40)
SAMPLINGS = [
    Sampling(greedy=True),
    Sampling(seed=5),
    Sampling(seed=6, temperature=0.7, top_k=9),
]


@pytest.fixture(autouse=True)
def on_cpu():
    """The backend whose rows do not depend on each other, so that everything is bit equal."""
    if not native.is_available():
        pytest.skip(native.why_not())
    with use_backend("cpu"):
        yield


def alone(engine, request, sampling):
    """(tokens, why they end) of one request, in slot 0, by the engine's plainest calls."""
    tokens = list(request.prompt)
    logits = engine.prefill([0], [tokens]) if len(tokens) < request.max_len else None
    while len(tokens) < request.max_len:
        greedy = sampling.greedy or len(tokens) - len(request.prompt) < request.n_greedy
        sampler = Sampler(sampling, "cpu")
        (token,) = sampler(logits, [request.record], [len(tokens)], [greedy])
        if token == NO_TOKEN:
            return tokens, "error"
        tokens.append(token)
        if token in STOPS:
            return tokens, "eos"
        if len(tokens) < request.max_len:
            logits = engine.decode([token], [0])
    return tokens, "length"


def some_requests(seed, count, vocab):
    """Of one token and of more, some with a greedy beginning, some with nothing to add."""
    draw = random.Random(seed)
    requests = []
    for record in draw.sample(range(1000), count):
        prompt = tuple(draw.randrange(vocab) for _ in range(draw.choice((1, 1, 2, 5))))
        longest = draw.randint(len(prompt), MAX_LEN)
        requests.append(Request(record, prompt, longest, draw.choice((0, 0, 3, 30))))
    return requests


def outcome(engine, requests, sampling):
    """record -> (tokens, reason), the stream of every record, and the tokens counted by steps."""
    streams, steps = {}, []
    done = {
        completion.request.record: (completion.tokens, completion.finish_reason)
        for together in run_requests(
            engine,
            iter(requests),
            sampling,
            stop_ids=STOPS,
            on_token=lambda record, token: streams.setdefault(record, []).append(token),
            on_step=steps.append,
        )
        for completion in together
    }
    return done, streams, sum(steps)


PLANS = {
    "direct": DecodePlan(),
    "lag": DecodePlan(lag=1),
    "buckets": DecodePlan(padded=True),
    "buckets, lag": DecodePlan(padded=True, lag=1),
}


@pytest.mark.parametrize("setting", ["4-8-4", "16-16-16"])
def test_every_plan_gives_the_tokens_of_one_sequence_alone(setting):
    model = quantized(tiny_llama(31, vocab=64), setting)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")  # some sequences end with an error
    plain = Engine(model, max_len=MAX_LEN)
    seen = set()
    for case, slots in enumerate((1, 3, 6)):
        engine = Engine(model, max_slots=slots, max_len=MAX_LEN)
        for sampling in SAMPLINGS:
            requests = some_requests(case, 9, 64)
            expected = {r.record: alone(plain, r, sampling) for r in requests}
            new = {r.record: expected[r.record][0][len(r.prompt) :] for r in requests}
            seen.update(reason for _, reason in expected.values())
            for name, plan in PLANS.items():
                engine.replace_cache(max_len=MAX_LEN, plan=plan)
                done, streams, counted = outcome(engine, requests, sampling)
                assert done == expected, (name, slots)
                assert streams == {record: tokens for record, tokens in new.items() if tokens}
                errors = sum(reason == "error" for _, reason in expected.values())
                assert counted == sum(map(len, new.values())) + errors
    assert seen == {"eos", "length", "error"}


@pytest.mark.parametrize("setting", ["4-8-4", "4-8-16"])
@pytest.mark.parametrize("lag", [0, 1])
def test_graphs_replay_the_same_tokens(setting, lag):
    model = quantized(tiny_llama(32, vocab=64), setting, "serving")
    engine = Engine(model, max_slots=6, max_len=MAX_LEN)
    requests = some_requests(9, 16, 64)
    for sampling in SAMPLINGS:
        engine.replace_cache(max_len=MAX_LEN, plan=DecodePlan())
        expected = outcome(engine, requests, sampling)
        graphs = RecordedGraphs()
        engine.replace_cache(max_len=MAX_LEN, plan=DecodePlan(True, lag, graphs))
        for _ in range(2):  # the second time from graphs alone
            assert outcome(engine, requests, sampling) == expected
            assert graphs.captures == len(engine.static.captured) <= 4
    assert set(engine.static.captured) <= {1, 2, 4, 6}


def test_graphs_of_other_settings_are_dropped():
    engine = Engine(tiny_llama(33, vocab=64), max_slots=2, max_len=MAX_LEN)
    graphs = RecordedGraphs()
    engine.replace_cache(max_len=MAX_LEN, plan=DecodePlan(True, 1, graphs))
    requests = [Request(i, (7, 8), 10) for i in range(2)]
    for sampling, captures in (
        (Sampling(seed=1), 1),
        (Sampling(seed=1), 1),
        (Sampling(seed=2), 2),
        (Sampling(seed=2, greedy=True), 3),
        (Sampling(seed=3, greedy=True), 3),  # greedy tokens have no seed
    ):
        outcome(engine, requests, sampling)
        assert graphs.captures == captures and engine.static.captured == (2,)


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_lengths_count_what_was_read(plan):
    """What the engine says of a slot, after its sequence has ended or was left in the middle."""
    engine = Engine(tiny_llama(34, vocab=64), max_slots=2, max_len=MAX_LEN)
    engine.replace_cache(max_len=MAX_LEN, plan=plan)
    free = engine.generate([[1, 2]], 9)[0].tokens
    assert engine.length(0) == 10  # the last token was never an input
    stop = free[5]
    done = engine.generate([[1, 2]], 9, stop_ids=[stop])[0]
    assert done.tokens == free[: free.index(stop, 2) + 1]
    assert engine.length(0) == len(done.tokens) - 1
    short, long = Request(0, (1, 2), 4), Request(1, (1, 2), 20)
    run = run_requests(engine, [short, long], Sampling(greedy=True))
    assert [done.request for done in next(run)] == [short]
    run.close()
    assert engine.generate([[1, 2]], 9)[0].tokens == free


def test_requests_are_read_as_slots_become_free():
    engine = Engine(tiny_llama(35, vocab=64), max_slots=2, max_len=MAX_LEN)
    engine.replace_cache(max_len=MAX_LEN, plan=replace(PLANS["lag"], padded=True))
    read = []

    def requests():
        for record in range(6):
            read.append(record)
            yield Request(record, (1,), 5)

    run = run_requests(engine, requests(), Sampling(greedy=True))
    assert len(next(run)) == 2
    assert len(read) <= 4
    assert sum(len(done) for done in run) == 4


@pytest.mark.parametrize("prompt", [(64,), (-1,), (1, 64), (), (1, 1.5)])
def test_bad_prompts(prompt):
    engine = Engine(tiny_llama(36, vocab=64, layers=1), max_len=MAX_LEN)
    with pytest.raises(InvalidArgument, match="prompts"):
        list(run_requests(engine, [Request(0, prompt, 9)], Sampling()))
    chosen = []
    with pytest.raises(InvalidArgument, match=r"prompts: .*prompt 2 "):
        engine.generate([[1], [2], prompt], 4, on_token=lambda *token: chosen.append(token))
    assert chosen == []  # all are looked at before the first token


@pytest.mark.parametrize("fields", [{"record": 2**63}, {"record": -1}, {"n_greedy": -1}])
def test_bad_requests(fields):
    engine = Engine(tiny_llama(36, vocab=64, layers=1), max_len=MAX_LEN)
    request = replace(Request(0, (1,), 9), **fields)
    with pytest.raises(InvalidArgument, match="requests: record"):
        list(run_requests(engine, [request], Sampling()))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.generate([[9, 8]], 2),
        lambda engine: next(run_requests(engine, [Request(5, (3,), 4)], Sampling())),
        lambda engine: engine.prefill([1], [[4, 4]]),
        lambda engine: engine.reset(),
        lambda engine: engine.assume_length(0, 1),
        lambda engine: engine.replace_cache(max_len=MAX_LEN),
    ],
)
def test_a_run_whose_engine_was_used_for_something_else_says_so(plan, use):
    engine = Engine(tiny_llama(37, vocab=64, layers=1), max_slots=3, max_len=MAX_LEN)
    engine.replace_cache(max_len=MAX_LEN, plan=plan)
    requests = [Request(0, (1, 2), 4), Request(1, (1, 2, 3), 20)]
    run = run_requests(engine, requests, Sampling(greedy=True))
    next(run)
    use(engine)
    with pytest.raises(InvalidArgument, match="used for something else before this run ended"):
        list(run)
    nested = run_requests(
        engine, requests, Sampling(greedy=True), on_token=lambda *token: use(engine)
    )
    with pytest.raises(InvalidArgument, match="used for something else"):
        list(nested)
    assert len(engine.generate([[1, 2]], 3)) == 1  # and the engine goes on
