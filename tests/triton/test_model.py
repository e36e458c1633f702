"""Whole models on the Triton backend: the law of tests/llmqat/test_parity.py on fewer seeds, and
the engine. CPU tensors only: the interpreter runs the kernels that a GPU would run; tests/device
has the same on a GPU.
"""

import pytest
import torch

from llmqat.runtime import Engine
from llmqat.runtime.sampling import Sampling
from llmqat_kernels import use_backend
from llmqat_kernels.testing import DTYPES
from tests.conftest import select_backend
from tests.llmqat.test_engine import quantized
from tests.llmqat.test_parity import QuantizedLinear, random_linear, served, through_disk_format
from tests.llmqat.tiny import random_tokens, tiny_llama


@pytest.fixture(autouse=True)
def on_triton():
    with select_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_converted_packed_served(dtype):
    for seed in range(25):
        prepared, x = random_linear(seed, dtype)
        packed = QuantizedLinear.from_qat(prepared)
        reloaded = through_disk_format(packed)
        with torch.no_grad():
            got = [f(x) for f in (prepared, packed, reloaded)]
            got.append(served(reloaded, x))
        with use_backend("reference"), torch.no_grad():
            prepared.clear_cache()
            want = prepared(x)
        for y in got:
            assert torch.equal(y, want), seed


@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_engine_chooses_the_tokens_of_the_cpu_backend(mode):
    model = quantized(tiny_llama(1), "4-8-4", mode)
    prompts = [row.tolist() for row in random_tokens(3, 2, 6)]
    tokens = {}
    for name in ("triton", "reference"):
        with use_backend(name):
            engine = Engine(model, max_slots=2, max_len=16)
            assert set(engine.backends().values()) == {name}
            results = engine.generate(prompts, max_new_tokens=8, sampling=Sampling(greedy=True))
        tokens[name] = [result.new_tokens for result in results]
    assert tokens["triton"] == tokens["reference"]
