"""Timing on a device: the parts that need none, and with a device the whole."""

import weakref

import pytest
import torch

from benchmarks import cuda


def test_copies_fill_the_cache_four_times():
    assert cuda.copies_for(traffic=100, l2_bytes=50) == 2
    assert cuda.copies_for(traffic=25_000_000, l2_bytes=50_000_000) == 8
    assert cuda.copies_for(traffic=10**9, l2_bytes=50_000_000) == 1
    assert cuda.copies_for(traffic=1, l2_bytes=50_000_000) == cuda.MAX_COPIES
    assert cuda.copies_for(traffic=0, l2_bytes=1) == 4


def test_a_turn_calls_every_copy_in_order():
    calls = []
    cuda.turn([lambda: calls.append(1), lambda: calls.append(2)])()
    assert calls == [1, 2]


def test_no_call_of_a_turn_writes_where_another_wrote():
    """Memory that is given back is what the next call gets, and it is still in the cache."""
    results, held = [], []

    def call():
        result = torch.ones(4096)
        results.append(weakref.ref(result))
        held.append(sum(found() is not None for found in results))
        return result

    run = cuda.turn([call] * 3)
    run()
    assert held == [1, 2, 3] and all(found() is None for found in results)
    cuda.turn([run] * 2)()  # a graph of several turns holds the results of one
    assert held == [1, 2, 3] * 3


@pytest.mark.parametrize("traffic", [1, 10**5, 10**7, 10**8, 10**10])
def test_what_a_turn_holds_is_bounded(traffic):
    """Results are part of the traffic: all copies of them are at most this much."""
    size = 50 * cuda.MIB
    held = cuda.copies_for(traffic, size) * traffic
    assert held < cuda.FLUSH * size + traffic


def test_a_graph_holds_many_short_calls_and_few_long_ones():
    assert cuda.turns_in_graph(20e-6, 5) == 12  # 60 calls
    assert cuda.turns_in_graph(300e-6, 5) == 2
    assert cuda.turns_in_graph(5e-3, 1) == 1
    assert cuda.turns_in_graph(1e-6, 64) == 1
    assert cuda.turns_in_graph(1e-6, 1) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_events_and_memory():
    x = torch.randn(1 << 20, device="cuda")
    seconds, how = cuda.times({"graph": [lambda: x * 2], "events": [lambda: x.sum().item()]}, 2)
    assert how == {"graph": "graph", "events": "events"}
    assert all(0 < t < 1 for values in seconds.values() for t in values)
    assert cuda.peak_bytes(lambda: x * 2) == 0
    assert cuda.peak_bytes(lambda: (x * 2 + 1).sum()) >= x.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_calls_of_a_graph_write_to_memory_of_their_own():
    x, places = torch.randn(1 << 20, device="cuda"), []

    def call():
        result = x * 2
        places.append(result.data_ptr())
        return result

    _, how = cuda.captured(cuda.turn([call] * 4))
    assert how == "graph" and len(set(places[-4:])) == 4
