"""W4A16 in the engine: codes stay codes where the backend multiplies them, and nothing changes but
the memory they take.
"""

from __future__ import annotations

import pytest
import torch

import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.config import QuantSpec
from llmqat.runtime import Engine, weights
from llmqat_kernels import native
from tests.llmqat.test_engine import all_logits, quantized
from tests.llmqat.tiny import random_tokens, tiny_llama

SETTINGS = [
    ("4-16-16", {}),
    ("8-16-8", {}),
    ("3-16-4", {"group_size": 16}),
    ("4-16-16", {"group_size": 32}),
]
needs_native = pytest.mark.skipif(not native.is_available(), reason=native.why_not())


@pytest.fixture
def dequantized(monkeypatch):
    """An engine of the same model that keeps float weights, as a backend without a kernel does."""

    def make(model, **options):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "multiplies_codes", lambda *args: False)
            return Engine(model, **options)

    return make


def linears(engine):
    return [linear for block in engine.weights.blocks for linear in block.linears]


@pytest.mark.parametrize(("setting", "fields"), SETTINGS, ids=str)
def test_codes_are_kept_where_there_is_a_kernel(backend, dequantized, setting, fields):
    model = quantized(tiny_llama(31), setting, **fields)
    engine, floats = Engine(model, max_len=8), dequantized(model, max_len=8)
    assert all(linear.scale is None for linear in linears(floats))
    for linear in linears(engine):
        assert not linear.integer and linear.a_bits == 16
        assert (linear.scale is not None) == (backend == "cpu")
    assert engine.weights.blocks[0].integer_bits is None and not engine.forward.fused
    share = engine.weight_bytes["linears"] / floats.weight_bytes["linears"]
    bits = int(setting[0])
    assert share < (0.4 if bits == 8 else 0.3) if backend == "cpu" else share == 1.0


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("setting", "fields"), SETTINGS, ids=str)
def test_logits_are_those_of_the_dequantized_weights(dequantized, setting, fields, dtype):
    with qk.use_backend("cpu"):
        model = quantized(tiny_llama(32, bias=True), setting, **fields).to(dtype)
        prompt = random_tokens(33, 1, 19)[0].tolist()
        engine, floats = Engine(model, max_len=24), dequantized(model, max_len=24)
        for tokens in (prompt, [3], [4, 5, 6]):
            assert torch.equal(engine.extend([0], [tokens]), floats.extend([0], [tokens]))


@pytest.mark.parametrize("setting", ["4-16-16", "4-16-8"])
def test_prepared_converted_and_packed_give_the_same_tokens(backend, tmp_path, setting):
    prepared = quantized(tiny_llama(34), setting, packed=False)
    converted = quantized(tiny_llama(34), setting)
    save_pretrained(converted, tmp_path / "packed")
    reloaded = from_pretrained(tmp_path / "packed")
    engines = [Engine(m, max_slots=4, max_len=40) for m in (prepared, converted, reloaded)]
    prompts = random_tokens(35, 4, 6).tolist()
    first, *others = ([done.tokens for done in e.generate(prompts, 30)] for e in engines)
    assert others == [first, first]
    tokens = random_tokens(36, 1, 10)[0].tolist()
    for engine in engines:
        engine.reset()
    logits = [all_logits(engine, tokens) for engine in engines]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@needs_native
def test_rows_do_not_depend_on_each_other():
    with qk.use_backend("cpu"):
        model = quantized(tiny_llama(37), "4-16-8")
        alone, together = Engine(model, max_len=64), Engine(model, max_slots=3, max_len=64)
        prompts = [random_tokens(i, 1, 5 + 9 * i)[0].tolist() for i in range(3)]
        after = together.prefill([2, 0, 1], prompts)
        for i, prompt in enumerate(prompts):
            alone.reset()
            for token in prompt[:-1]:
                alone.decode([token], [0])
            assert torch.equal(alone.decode([prompt[-1]], [0])[0], after[i])


@needs_native
def test_the_dtype_of_float_weights_is_not_that_of_codes():
    with qk.use_backend("cpu"):
        model = quantized(tiny_llama(38), "4-16-16")
        usual, narrow = (Engine(model, max_len=8, weight_dtype=d) for d in (None, torch.bfloat16))
        assert narrow.weight_bytes["embedding"] < usual.weight_bytes["embedding"]
        for a, b in zip(linears(usual), linears(narrow), strict=True):
            assert torch.equal(a.weight, b.weight) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "keeps"),
    [
        (4, -1, torch.bfloat16, True),
        (2, -1, torch.float16, True),
        (4, -1, torch.float32, False),
        (8, -1, torch.bfloat16, False),
        (4, 32, torch.bfloat16, False),
    ],
)
def test_what_the_cuda_kernel_takes(monkeypatch, bits, group_size, dtype, keeps):
    chosen = type("Choice", (), {"backend": "cuda"})
    monkeypatch.setattr(weights, "resolve", lambda *args: chosen)
    spec = QuantSpec(bits, group_size)
    assert weights.multiplies_codes(torch.device("cuda"), spec, dtype) == keeps
