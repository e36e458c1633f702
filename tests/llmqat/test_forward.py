"""The blocks as a list of operators: how many there are, and joined ones against the pairs they
stand for.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from llmqat.runtime import Engine
from llmqat.runtime.forward import JOINED
from tests.llmqat.test_engine import quantized
from tests.llmqat.tiny import random_tokens, tiny_llama

OPERATORS_OF_A_BLOCK = {
    "reference": {
        "rms_norm_quantize": 2,
        "repacked_matmul": 1,
        "repacked_matmul_add": 2,
        "rope_quantize_append_queries": 1,
        "attention_decode_quantize": 1,
        "repacked_matmul_silu_mul": 1,
        "quantize": 1,
    },
    "cpu": {
        "rms_norm_quantize": 2,
        "repacked_matmul": 4,
        "rope_quantize_append": 1,
        "rope": 1,
        "attention_decode": 1,
        "quantize": 1,
        "silu_mul_quantize": 1,
    },
}
"""Nine where pairs are joined, else eleven: docs/runtime.md."""


def counted(engine):
    """The engine's operators from now on: name -> calls."""
    calls, kernels = Counter(), vars(engine.forward.kernels)

    def count(name, kernel):
        def run(*args):
            calls[name] += 1
            return kernel(*args)

        return run

    kernels.update({name: count(name, kernel) for name, kernel in list(kernels.items())})
    return calls


def test_operators_of_a_block(backend):
    calls = []
    for layers in (1, 2):
        model = quantized(tiny_llama(81, layers=layers), "4-8-8")
        engine = Engine(model, max_len=8, fuse=False)
        calls.append(counted(engine))
        engine.prefill([0], [[1]])
    assert calls[1] - calls[0] == OPERATORS_OF_A_BLOCK[backend]
    joined = "attention_decode_quantize" in OPERATORS_OF_A_BLOCK[backend]
    assert sum((calls[1] - calls[0]).values()) == (9 if joined else 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "setting,mode", [("4-8-8", "paper"), ("8-8-4", "serving"), ("4-4-16", "paper")]
)
def test_joined_operators_give_the_same_bits(on_reference, setting, mode, dtype):
    model = quantized(tiny_llama(82, bias=True), setting, mode).to(dtype)
    prompt = random_tokens(83, 1, 9)[0].tolist()
    joined, composed = (Engine(model, max_len=16) for _ in range(2))
    assert joined.forward._joined == set(JOINED)
    composed.forward._joined = set()
    for tokens in (prompt, [3], [4]):
        assert torch.equal(joined.extend([0], [tokens]), composed.extend([0], [tokens]))


def test_only_kernels_are_joined(backend):
    """A backend that would compose the pair again runs the two operators themselves."""
    engine = Engine(quantized(tiny_llama(84, layers=1), "4-8-8"), max_len=8)
    assert engine.forward._joined == (set(JOINED) if backend == "reference" else set())
    assert set(engine.backends().values()) == {backend}
