"""How many launches a block takes in a decode step on the `cuda` backend: ten (docs/runtime.md)."""

from __future__ import annotations

from collections import Counter

import torch

import llmqat
from llmqat.runtime.graphs import DecodePlan, Row
from llmqat.runtime.sampling import Sampler, Sampling
from llmqat_kernels import use_backend
from tests.llmqat.tiny import packed_llama
from tests.twin import launches, tensors

LAUNCHES_A_BLOCK = Counter(
    {
        "rms_norm_quantize_kernel": 2,
        "repacked_matmul": 1,
        "rope_quantize_append_queries": 1,
        "attention_decode_quantize": 2,
        "repacked_matmul_add": 2,
        "repacked_matmul_silu_mul": 1,
        "quantize": 1,
    }
)


def launches_of_a_step(model, rows):
    """Everything that a device is given in one decode step of so many rows."""
    engine = llmqat.Engine(model, max_slots=rows, max_len=16, graphs=False)
    engine.replace_cache(max_len=16, plan=DecodePlan(padded=True))
    engine.static.configure(Sampler(Sampling(greedy=True), "cuda"))
    engine.static.load([Row(slot, slot, 0, 0, 5) for slot in range(rows)])
    launches.LAUNCHED.clear()
    engine.static.step()
    return Counter(launches.LAUNCHED)


def launches_of_a_block_by_cuda():
    """The difference of two blocks and one, at several rows and in both KV modes."""
    copied = launches.native("rope_quantize_append", (*(torch.ones(2, 2).T,) * 3,))
    assert len(list(copied)) == 4  # neither dense rows nor a table: three copies and the kernel
    for setting, mode in (("4-8-8", "paper"), ("4-8-4", "serving")):
        models = [packed_llama(setting, variant={"layers": n}, kv_mode=mode) for n in (1, 2)]
        with tensors.device(), use_backend("cuda"):
            models = [model.to("cuda") for model in models]
            for rows in (1, 2, 16):
                one, two = (launches_of_a_step(model, rows) for model in models)
                assert two - one == LAUNCHES_A_BLOCK and not one - two, (rows, mode, two)
    assert sum(LAUNCHES_A_BLOCK.values()) == 10
