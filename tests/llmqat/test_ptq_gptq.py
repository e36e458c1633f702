"""GPTQ against an independent slow reference, and on whole models."""

import copy

import pytest
import torch

import llmqat
import llmqat_kernels as qk
from llmqat.config import QATConfig, QuantSpec
from llmqat.convert import state_of
from llmqat.errors import ConfigError
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.ptq import BlockJournal, gptq, rtn
from llmqat.ptq.awq import output_error
from llmqat.ptq.calibration import Gram
from llmqat.ptq.gptq import gptq_codes
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("4-16-16")


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


def correlated(seed, k=48, tokens=400, n=24):
    """A weight [n, k] and a Gram matrix [k, k] of inputs with strong correlations and outliers."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)
    x = torch.randn(tokens, k, generator=generator) @ mix.T
    x[:, 3] *= 8
    weight = torch.randn(n, k, generator=generator)
    return weight, (x.T @ x).double()


def slow(weight, gram, spec, damping, order=None, static=False):
    """Optimal brain quantization in a fixed order, from its definition: after each column the rest
    moves to the optimum of the remaining quadratic problem, and the column leaves the matrix. fp64.
    """
    w = weight.double().clone()
    k = w.shape[1]
    h = gram.double().clone()
    h += torch.eye(k, dtype=torch.float64) * damping * h.diagonal().mean()
    group = k if spec.group_size == -1 else spec.group_size
    bf16 = torch.bfloat16 if spec.scale_dtype == "bfloat16" else torch.float32
    order = list(range(k)) if order is None else order
    codes = torch.zeros(w.shape, dtype=torch.int8)
    scales = {}
    left = list(order)
    for j in order:
        g = j // group
        if g not in scales:
            source = weight if static else w.float()
            columns = source[:, g * group : (g + 1) * group].float()
            scales[g] = qk.quantize(columns, spec.bits, scale_dtype=bf16)[1].double()
        codes[:, j] = torch.round(w[:, j] / scales[g]).clamp(-spec.qmax, spec.qmax).to(torch.int8)
        error = w[:, j] - codes[:, j] * scales[g]
        left.remove(j)
        if left:
            # The change d of the rest minimizes |error x_j + d x_rest|^2.
            rest = h[left][:, left]
            w[:, left] += torch.linalg.solve(rest, h[left, j].unsqueeze(1) @ error.unsqueeze(0)).T
    scale = torch.stack([scales[g] for g in sorted(scales)], 1).float()
    return codes, scale[:, 0] if spec.group_size == -1 else scale


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("block_columns", [1, 7, 128])
def test_equals_the_slow_reference(group_size, block_columns, scale_dtype):
    spec = QuantSpec(4, group_size, scale_dtype)
    weight, gram = correlated(1)
    codes, scale = gptq_codes(weight, gram, spec, block_columns=block_columns)
    expected, expected_scale = slow(weight, gram, spec, 0.01)
    # Chosen seeds have no tie that fp32 and fp64 would break differently.
    assert torch.equal(codes, expected)
    assert torch.allclose(scale, expected_scale, rtol=2**-7)
    if group_size == -1:
        assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_act_order_equals_the_slow_reference_in_that_order(group_size):
    spec = QuantSpec(4, group_size, "bfloat16")
    weight, gram = correlated(2)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    assert order != sorted(order)
    codes, scale = gptq_codes(weight, gram, spec, act_order=True)
    expected, expected_scale = slow(weight, gram, spec, 0.01, order, static=True)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)
    # Renaming the channels renames the columns of the result, no more.
    if group_size == -1:
        p = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        renamed, _ = gptq_codes(weight[:, p], gram[p][:, p], spec, act_order=True)
        assert torch.equal(renamed, codes[:, p])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"act_order": True}])
@pytest.mark.parametrize("group_size", [-1, 16, 4])
def test_less_error_than_rounding_and_on_the_grid(bits, options, group_size):
    spec = QuantSpec(bits, group_size, "bfloat16")
    weight, gram = correlated(3)
    codes, scale = gptq_codes(weight, gram, spec, **options)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= spec.qmax
    assert torch.equal(scale, scale.bfloat16().float())
    shape = (24,) if group_size == -1 else (24, 48 // group_size)
    assert scale.shape == shape and scale.dtype == torch.float32
    chosen = qk.dequantize(codes, scale, group_size=group_size)
    nearest = qk.fake_quantize(weight, bits, group_size=group_size, scale_dtype=torch.bfloat16)
    assert output_error(weight, chosen, gram) < 0.8 * output_error(weight, nearest, gram)


def test_uncorrelated_inputs_give_round_to_nearest():
    weight, _ = correlated(4)
    gram = torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1)
    for options in ({}, {"act_order": True}):
        codes, scale = gptq_codes(weight, gram, CONFIG.weight, **options)
        nearest = qk.quantize(weight, 4, scale_dtype=torch.bfloat16)
        assert torch.equal(codes, nearest[0]) and torch.equal(scale, nearest[1])


def test_unused_channels_and_zero_rows_keep_their_nearest_codes():
    weight, gram = correlated(5)
    gram[7], gram[:, 7] = 0, 0
    weight[2] = 0
    codes, scale = gptq_codes(weight, gram, CONFIG.weight)
    nearest, expected = qk.quantize(weight, 4, scale_dtype=torch.bfloat16)
    assert torch.equal(codes[:, 7], nearest[:, 7])
    assert not codes[2].any() and scale[2] == 1
    assert torch.equal(scale, expected)


def test_singular_inputs_need_damping():
    weight, _ = correlated(6)
    gram = torch.ones(48, 48)
    with pytest.raises(ConfigError, match="damping: 1e-18 leaves"):
        gptq_codes(weight, gram, CONFIG.weight, damping=1e-18)
    gptq_codes(weight, gram, CONFIG.weight)


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("4-16-16", {}),
        ("4-16-16", {"group_size": 16}),
        ("4-8-4", {"kv_mode": "serving"}),
        ("8-8-8", {}),
        ("3-16-16", {"weight_scale_dtype": "float32"}),
    ],
)
@pytest.mark.parametrize("variant", [{}, {"kv_heads": 4, "bias": True, "tied": True}])
def test_whole_model(tmp_path, setting, fields, variant):
    config = QATConfig.parse(setting, **fields)
    plain, tokens = tiny_llama(**variant), random_tokens(0, 16, 32)
    model = gptq(copy.deepcopy(plain), config, tokens)
    assert (state_of(model).stage, state_of(model).config) == ("packed", config)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    nearest = rtn(copy.deepcopy(plain), config)
    if config.group_size == -1:  # the grid is that of rounding, the points are not
        for name, buffer in nearest.named_buffers():
            if name.endswith("weight_scale"):
                assert torch.equal(buffer, model.get_buffer(name))
    llmqat.save_pretrained(model, tmp_path / "m")
    loaded = llmqat.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_first_linears_get_the_codes_of_their_inputs():
    """q, k and v of block 0 see the float model's inputs: their codes follow from these alone."""
    plain, tokens = tiny_llama(), random_tokens(0, 16, 32)
    with torch.no_grad():
        x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(tokens)).reshape(-1, 64)
    model = gptq(copy.deepcopy(plain), CONFIG, tokens, batch_size=16)
    for short in ("q_proj", "k_proj", "v_proj"):
        weight = plain.model.layers[0].self_attn.get_submodule(short).weight
        codes, scale = gptq_codes(weight, (x.T @ x).double(), CONFIG.weight)
        packed = model.model.layers[0].self_attn.get_submodule(short)
        assert torch.equal(packed.int8_codes(), codes)
        assert torch.equal(packed.weight_scale, scale)


def test_a_sink_token_does_not_decide_alone():
    """One token in 32 that is a hundred times longer: the others' error must not exceed
    rounding's.
    """
    weight, _ = correlated(7)
    generator = torch.Generator().manual_seed(7)
    ordinary, held_out = torch.randn(2, 992, 48, generator=generator).unbind()
    sinks = (
        200 * torch.randn(32, 1, generator=generator).abs() * torch.randn(48, generator=generator)
    )
    inputs = torch.cat([ordinary, sinks])
    nearest = qk.fake_quantize(weight, 4, scale_dtype=torch.bfloat16)
    rounding = output_error(weight, nearest, held_out.T @ held_out)
    errors = []
    for limit in (0, 3.0):
        gram = Gram.of(iter([inputs]), "here", limit).matrix
        chosen = qk.dequantize(*gptq_codes(weight, gram, CONFIG.weight))
        errors.append(output_error(weight, chosen, held_out.T @ held_out))
    assert errors[1] < 1.05 * rounding < errors[0]


def test_better_than_rounding_on_its_tokens():
    plain, tokens = tiny_llama(layers=3), random_tokens(0, 32, 32)
    config = QATConfig.parse("4-16-16")
    with torch.no_grad():
        target = plain(tokens).logits
        ours = gptq(copy.deepcopy(plain), config, tokens)(tokens).logits
        nearest = rtn(copy.deepcopy(plain), config)(tokens).logits
    assert (ours - target).square().mean() < 0.8 * (nearest - target).square().mean()


def test_same_arguments_same_codes():
    tokens = random_tokens(0, 8, 16)
    first, second = (gptq(tiny_llama(), CONFIG, tokens, act_order=True) for _ in range(2))
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, second.get_buffer(name))


class Killed(Exception):
    pass


class KilledJournal(BlockJournal):
    """Dies after saving block 1."""

    def save(self, index, tensors):
        super().save(index, tensors)
        if index == 1:
            raise Killed


def test_a_killed_run_goes_on_with_the_same_codes(tmp_path):
    tokens, config = random_tokens(0, 8, 16), QATConfig.parse("4-8-4")
    expected = gptq(tiny_llama(layers=4), config, tokens)
    with pytest.raises(Killed), KilledJournal(tmp_path / "j", {}, resume=False) as journal:
        gptq(tiny_llama(layers=4), config, tokens, journal=journal)
    with BlockJournal(tmp_path / "j", {}, resume=True) as journal:
        assert journal.load(1) is not None and journal.load(2) is None
        resumed = gptq(tiny_llama(layers=4), config, tokens, journal=journal)
        assert journal.load(3) is not None
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer, resumed.get_buffer(name))


def test_refuses_before_it_calibrates():
    tokens = random_tokens(0, 2, 8)
    model = tiny_llama()
    for options, message in (
        ({"damping": 0}, "damping: 0"),
        ({"damping": float("nan")}, "damping: nan"),
        ({"block_columns": 0}, "block_columns: 0"),
        ({"token_limit": 0.5}, "token_limit: 0.5"),
        ({"token_limit": float("inf")}, "token_limit: inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            gptq(model, CONFIG, tokens, **options)
    for config, message in (
        (QATConfig.parse("16-16-16"), "w_bits"),
        (QATConfig.parse("4-16-16", group_size=48), "group_size: 48"),
        ("4-16-16", "expected a QATConfig"),
    ):
        with pytest.raises(ConfigError, match=message):
            gptq(model, config, tokens)
    assert state_of(model) is None
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"up_proj.*infinite"):
        gptq(model, CONFIG, tokens)
    with pytest.raises(ConfigError, match="already packed"):
        gptq(rtn(tiny_llama(), CONFIG), CONFIG, tokens)
