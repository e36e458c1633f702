"""Random models and the bytes of a decode step."""

import pytest
import torch

from benchmarks.random_model import (
    STD,
    config_of,
    decode_bound,
    decode_bytes,
    float_model,
    packed_model,
)
from llmqat import Engine
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat_kernels import use_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("setting", ["4-8-8", "8-8-4"])
def test_a_packed_model_runs_and_has_the_codes_of_a_quantizer(setting):
    model = packed_model(config_of("tiny"), setting, "paper", CPU)
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 2 * 7
    for linear in linears:
        bits = linear.spec.weight.bits
        codes = linear.int8_codes()
        assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
        assert float(linear.dequantize().std()) == pytest.approx(STD, rel=0.05)
    (done,) = Engine(model, max_len=16).generate([[1, 2, 3]], 4)
    assert len(done.tokens) == 7


def test_seeds_decide_the_weights():
    first, same, other = (
        packed_model(config_of("tiny"), "4-8-8", "paper", CPU, seed=seed) for seed in (0, 0, 1)
    )
    names = [n for n, t in first.state_dict().items() if t.dim() > 1]
    assert all(torch.equal(first.state_dict()[n], same.state_dict()[n]) for n in names)
    assert not any(torch.equal(first.state_dict()[n], other.state_dict()[n]) for n in names)


def test_a_float_model_has_no_empty_tensor():
    model = float_model(config_of("tiny", layers=1), CPU)
    assert model.dtype == torch.bfloat16 and len(model.model.layers) == 1
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_bytes_of_a_step_are_those_of_the_engine():
    model = packed_model(config_of("tiny"), "4-8-8", "paper", CPU)
    with use_backend("reference"):  # whose layout has no padding
        engine = Engine(model, max_slots=3, max_len=32)
    held = engine.weight_bytes
    weights = held["linears"] + held["head"] + held["norms"]
    assert decode_bytes(model.config, 4, 8, 0, 0) == weights
    assert decode_bytes(model.config, 4, 8, 3, 32) == weights + engine.cache_bytes


@pytest.mark.parametrize(
    ("bandwidth", "name", "form", "batch", "expected"),
    [
        (2039e9, "llama-7b", (4, 8), 1, 505),
        (3350e9, "llama-7b", (4, 8), 1, 830),
        (4800e9, "llama-7b", (4, 8), 1, 1189),
        (2039e9, "llama-7b", (4, 8), 64, 3447),
        (2039e9, "llama-7b", (4, 4), 64, 6310),
        (2039e9, "llama-7b", (16, 16), 1, 143),
        (2039e9, "llama-13b", (4, 8), 1, 271),
    ],
)
def test_the_memory_limit_of_decoding(bandwidth, name, form, batch, expected):
    """Limits by hand: 3.24 GB linears, 0.26 GB head, 0.54 GB cache of a 7B model."""
    step = decode_bytes(config_of(name), *form, batch, 2048)
    assert decode_bound(bandwidth, batch, step) == pytest.approx(expected, rel=3e-3)
