"""The kept codes of a trained weight: stale never, whoever writes the weight and in what graph."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import llmqat_kernels as qk
from llmqat_kernels import nn as qnn
from tests.llmqat.processes import launch

BITS = qnn.LinearBits(4, 8)


def linear(k=16, n=8):
    return qnn.QATLinear(k, n, bits=BITS)


def assert_fresh(layer):
    codes, scale = layer.weight_codes()
    expected = qk.quantize(layer.weight.detach(), 4, scale_dtype=torch.bfloat16)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


def test_weights_swapped_around_an_evaluation():
    """As packages for moving averages do it: through `.data`, which no version counter sees."""
    layer, x = linear(), torch.randn(3, 16)
    layer(x)
    stored = layer.weight.detach().clone()
    layer.weight.data.copy_(torch.randn(8, 16))
    layer.eval()
    assert_fresh(layer)
    layer.weight.data.copy_(stored)
    assert layer.train() is layer
    assert_fresh(layer)


def test_codes_outlive_a_mode_that_does_not_change():
    layer = linear()
    codes, _ = layer.weight_codes()
    layer.train()
    assert layer.weight_codes()[0] is codes


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_remember_whether_to_keep(copied, keep):
    layer = linear()
    layer.keep_codes(keep)
    clone = copied(layer)
    assert (clone.weight_codes()[0] is clone.weight_codes()[0]) == keep


def _saving_quantize(_, operator, *args, **options):
    saved = operator is torch.ops.llmqat.quantize.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("tokens", [3, 16])  # 16: codes of x and of the weight have one shape
def test_selective_checkpointing_that_saves_codes(tokens):
    first, second = linear(16, 16), linear(16, 16)

    def block(x):
        rows = qnn.QuantizedRows.quantize(first(qnn.QuantizedRows.quantize(x, 8)), 8)
        return second(rows)

    x = torch.randn(tokens, 16, requires_grad=True)
    inputs = [x, first.weight, second.weight]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    for layer in (first, second):
        layer.clear_cache()
    context = partial(create_selective_checkpoint_contexts, _saving_quantize)
    y = checkpoint(block, x, use_reentrant=False, context_fn=context)
    got = torch.autograd.grad(y.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_traced_graph_computes_the_codes(mode, pre_dispatch):
    layer, x = linear(), torch.randn(3, 16)
    layer(x)
    graph = make_fx(
        layer, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
    )(x)
    layer.weight.data.copy_(torch.randn(8, 16))
    layer.clear_cache()
    assert torch.equal(graph(x), layer(x))


def test_fake_weights_have_no_kept_codes():
    with torch._subclasses.FakeTensorMode():
        layer, x = linear(), torch.randn(3, 16)
    assert layer(x).shape == (3, 8)
    assert layer.weight_codes()[0] is not layer.weight_codes()[0]


def test_a_captured_graph_computes_the_codes(monkeypatch):
    layer, calls, real = linear(), [], qk.quantize
    monkeypatch.setattr(qk, "quantize", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    for _ in range(3):  # what `make_graphed_callables` does to warm up
        layer.weight_codes()
    assert len(calls) == 1
    with capture(monkeypatch):
        layer.weight_codes()
        assert len(calls) == 2
    for _ in range(2):  # replays of a captured optimizer step, and a forward after each
        layer.weight.data.neg_()
        assert_fresh(layer)


@contextmanager
def capture(monkeypatch):
    """As if a CUDA graph were captured."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def test_a_captured_whole_step_computes_the_codes_once(monkeypatch):
    layer = linear()
    kept = layer.weight_codes()[0]
    with capture(monkeypatch), qnn.whole_step():
        first = layer.weight_codes()[0]
        assert first is not kept and layer.weight_codes()[0] is first  # recompute, backward
        layer.weight.data.neg_()
        _next_step(layer)
        assert layer.weight_codes()[0] is not first  # behind the optimizer, as without a graph
    with capture(monkeypatch), qnn.whole_step():  # another graph: its replays must make their own
        second = layer.weight_codes()[0]
        assert second is layer.weight_codes()[0]
        with qnn.whole_step():
            assert layer.weight_codes()[0] is not second
    for _ in range(2):  # replays
        layer.weight.data.neg_()
        assert_fresh(layer)


def _next_step(layer):
    """An optimizer's step that writes nothing."""
    torch.optim.SGD(layer.parameters(), lr=0.0).step()


def _sharded_by_a_stranger(wrap):
    """A worker: logits before an edit of the shards, after it, and with caches cleared.

    Gathered weights have one address here, as an allocator of a GPU would give them.
    """

    def work(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        layers, x = [linear(16, 16) for _ in range(4)], torch.randn(3, 16)
        model = wrap(nn.Sequential(*layers))
        nn.Parameter.data_ptr = lambda _: 0
        with torch.no_grad():
            logits = [model(x)]
            with _writable(model):
                for p in model.parameters():
                    p.add_(0.3 * torch.sign(p))
            logits.append(model(x))
            for layer in layers:
                layer.clear_cache()
            logits.append(model(x))
        dist.destroy_process_group()
        return [t.tolist() for t in logits]

    return work


def _writable(model):
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model)
    return nullcontext()


def _fsdp2(model):
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def _replicate(model):
    for layer in model:
        replicate(layer)
    return replicate(model)


def _fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("wrap", [_fsdp2, _replicate, _fsdp1], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_gathered_weights_have_no_kept_codes(wrap):
    for status, result in launch(_sharded_by_a_stranger(wrap)):
        assert status == 0, result
        before, after, fresh = result
        assert after == fresh != before
