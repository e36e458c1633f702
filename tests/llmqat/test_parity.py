"""The one law: prepared == converted == packed == served, bit for bit.

Small random linears over 1,000 seeds and three dtypes, K and V in both modes, and greedy tokens of
whole models.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.checkpoint.format import LinearShape, decode_linear, encode_linear
from llmqat.config import SCALE_DTYPES, QATConfig
from llmqat.convert import convert, prepare
from llmqat.nn.linear import LinearSpec, QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear, held_scales
from llmqat.runtime.forward import Forward
from llmqat.runtime.weights import fuse
from tests.llmqat.kv_codes import quantize_kv
from tests.llmqat.tiny import random_tokens, tiny_llama

SEEDS = 1000
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = ("4-8", "8-8", "4-6", "4-4", "2-8", "3-5", "6-7")


def random_linear(seed, dtype):
    """A QATLinear of a random small shape, setting and scale of values, and its input."""
    rng = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))

    group = (-1, -1, 4, 8)[pick(0, 3)]
    k = pick(1, 40) if group == -1 else group * pick(1, 5)
    n, m = pick(1, 24), pick(1, 5)
    setting = SETTINGS[pick(0, len(SETTINGS) - 1)]
    config = QATConfig.parse(
        f"{setting}-{(4, 8, 16)[pick(0, 2)]}",
        group_size=group,
        weight_scale_dtype=SCALE_DTYPES[pick(0, 2 if group != -1 and setting[0] in "234" else 1)],
    )
    linear = nn.Linear(k, n, bias=bool(pick(0, 1)))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k, generator=rng) * 10.0 ** pick(-3, 1))
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(n, generator=rng))
        if pick(0, 4) == 0:
            linear.weight[pick(0, n - 1)] = 0
    x = torch.randn(m, k, generator=rng) * 10.0 ** pick(-2, 2)
    if pick(0, 4) == 0:
        x[0] = 0
    spec = LinearSpec.from_config(config, is_kv=bool(pick(0, 1)))
    return QATLinear.adopt(linear.to(dtype), spec), x.to(dtype)


def through_disk_format(packed):
    """The linear after its tensors went through the layout of a checkpoint."""
    spec = packed.spec
    weight, size = spec.weight, (packed.out_features, packed.in_features)
    shape = LinearShape(*size, weight.bits, weight.group_size, weight.integer_scales)
    encoded = encode_linear(packed.weight_codes, packed.scales, shape)
    codes, scales = decode_linear(encoded, shape, "linear")
    loaded = QuantizedLinear.empty(*reversed(size), spec, bias_dtype=None)
    loaded.weight_codes, loaded.bias = codes, packed.bias
    loaded.weight_scale, loaded.weight_multiplier = held_scales(scales, weight)
    return loaded


def served(packed, x):
    """What the engine computes: its own layout of the weight on codes of the input; the `paper`
    output quantizer is the cache's.
    """
    linear = fuse([packed], x.dtype)
    codes, scale = qk.quantize(x, linear.a_bits)
    engine = SimpleNamespace(kernels=torch.ops.llmqat, dtype=x.dtype)
    y = Forward.integer(engine, linear, codes, scale)
    output = packed.spec.output
    return qk.fake_quantize(y, output.bits) if output.enabled else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linears(backend, dtype):
    for seed in range(SEEDS):
        prepared, x = random_linear(seed, dtype)
        packed = QuantizedLinear.from_qat(prepared)
        reloaded = through_disk_format(packed)
        assert torch.equal(packed.int8_codes(), prepared.weight_codes()[0]), seed
        assert torch.equal(packed.scales, prepared.weight_codes()[1]), seed
        for name, tensor in packed.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor), (seed, name)
        with torch.no_grad():
            expected = prepared(x)
            assert expected.dtype == dtype
            assert torch.equal(packed(x), expected), seed
            assert torch.equal(reloaded(x), expected), seed
            assert torch.equal(served(reloaded, x), expected), seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_activations(backend, dtype):
    """A16: codes and scales are equal; outputs by the 2x rule against fp64 (spec 7)."""
    for seed in range(100):
        prepared, x = random_linear(seed, dtype)
        config = QATConfig.parse("4-16-16", group_size=prepared.spec.weight.group_size)
        prepared.spec = LinearSpec.from_config(config)
        prepared.clear_cache()
        packed = QuantizedLinear.from_qat(prepared)
        assert torch.equal(packed.int8_codes(), prepared.weight_codes()[0]), seed
        with torch.no_grad():
            weight = packed.dequantize(dtype)
            bias = None if prepared.bias is None else prepared.bias.double()
            exact = nn.functional.linear(x.double(), weight.double(), bias)
            plain = nn.functional.linear(x, weight, prepared.bias)
            bound = 2 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()
            for linear in (prepared, packed, through_disk_format(packed)):
                assert (linear(x).double() - exact).abs().max() <= bound, seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_kv_codes_and_scales(backend, mode, dtype):
    """What training fake-quantizes is what the served cache stores, and what it reads back."""
    heads, head_dim, tokens = 2, 64, 3
    angles = torch.outer(torch.arange(tokens), 10000 ** (-torch.arange(32) / 32.0))
    cos, sin = angles.cos(), angles.sin()
    positions, slots = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)
    for seed in range(SEEDS):
        bits = (4, 8)[seed % 2]
        rng = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(tokens, heads, head_dim, generator=rng).to(dtype) for _ in range(2))
        cache = qk.KVCache.allocate(1, heads, tokens, head_dim, bits=bits, mode=mode)
        qk.rope_quantize_append(k, v, cos, sin, cache, slots, positions)
        k_seen = k if mode == "paper" else qk.rope(k, cos, sin, positions)
        for x, stored, scales in (
            (k_seen, cache.k_codes, cache.k_scale),
            (v, cache.v_codes, cache.v_scale),
        ):
            codes, scale = quantize_kv(x.transpose(0, 1)[None], bits, mode)
            held = qk.unpack_int4(stored) if bits == 4 else stored
            assert torch.equal(held, codes), seed
            assert torch.equal(scales, scale), seed
            row = x.reshape(tokens, -1) if mode == "paper" else x
            trained = qk.fake_quantize(row, bits).view(tokens, heads, head_dim)
            widened = scale[0, :, None, None] if mode == "paper" else scale[0].T[..., None]
            served = (codes[0].transpose(0, 1) * widened).to(dtype)
            assert torch.equal(served, trained), seed


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ({"kv_heads": 4}, {"kv_mode": "serving"}),
        ({"tied": True, "bias": True}, {"kv_mode": "paper"}),
        ({"heads": 6, "kv_heads": 3, "intermediate": 100, "layers": 3}, {"kv_mode": "serving"}),
        ({"dtype": torch.bfloat16}, {"kv_mode": "paper", "weight_scale_dtype": "float32"}),
    ],
    ids=["mha", "tied-bias", "gqa", "bf16"],
)
def test_greedy_tokens(backend, tmp_path, variant, options):
    """500 greedy tokens a variant, 2,000 in all: equal at every position."""
    model = tiny_llama(11, **variant)
    prepared = prepare(model, QATConfig.parse("4-8-4", **options))
    save_pretrained(convert(copy.deepcopy(prepared)), tmp_path / "model")
    reloaded = from_pretrained(tmp_path / "model")
    prompt = random_tokens(8, 10, 5)
    generate = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    expected = prepared.generate(prompt, **generate)[:, 5:]
    got = reloaded.generate(prompt, **generate)[:, 5:]
    assert expected.numel() == 500 and len(expected.unique()) > 20
    agreement = (expected == got).float().mean().item()
    assert agreement == 1.0 if backend == "reference" else agreement >= 0.999
    with torch.no_grad():
        logits = [m(expected[:2]).logits for m in (prepared, reloaded)]
    assert torch.equal(*logits)


def test_training_then_packing(tmp_path):
    """After optimizer steps the packed model is still the trained one."""
    model = prepare(tiny_llama(12), QATConfig.parse("4-8-8", kv_mode="serving")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        model(random_tokens(step, 2, 16)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tokens = random_tokens(9, 2, 16)
    with torch.no_grad():
        expected = model(tokens).logits
        save_pretrained(convert(model), tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model")(tokens).logits, expected)
