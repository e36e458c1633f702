"""Models whose weight groups have integer scales (spec 18): trained, packed, loaded, served."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained, save_pretrained, verify_export
from llmqat.cli import main
from llmqat.config import QATConfig, QuantSpec
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError
from llmqat.eval.cost import weight_bytes
from llmqat.nn.linear import LinearSpec, QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.ptq.awq import output_error
from llmqat.ptq.gptq import gptq_codes
from llmqat.ptq.methods import METHODS
from llmqat.runtime import Engine
from llmqat_kernels import nn as qnn
from llmqat_kernels.spec.quantize import group_scales, split_group_scales
from tests.llmqat.checkpoint_attacks import SCALE, refresh, tensor
from tests.llmqat.test_engine import all_logits
from tests.llmqat.test_ptq_gptq import correlated
from tests.llmqat.tiny import packed_llama, random_tokens, tiny_llama
from tests.llmqat.tiny_families import tiny_model

GROUPS = {"group_size": 16, "weight_scale_dtype": "integer"}
SPEC = LinearSpec(QuantSpec(4, 16, "integer"), QuantSpec(8))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def linears(model, kind):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


# Scales


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_tell_their_parts(bits):
    """Rows from 1e-25 to 1e25, of zeros, of one group that is not zero, of groups far apart."""
    rng = torch.Generator().manual_seed(bits)
    x = torch.randn(4000, 24, generator=rng) * 10.0 ** torch.linspace(-25, 25, 4000)[:, None]
    x[::7] = 0
    x[1::7, 8:] = 0
    x[2::7, :8] *= 1e-3
    x[3::7] = 1.0
    for group in (1, 8, 24):
        _, multiplier, scale = qk.quantize_integer_groups(x, bits, group_size=group)
        assert torch.equal(scale.bfloat16().float(), scale)
        got = split_group_scales(group_scales(scale, multiplier))
        assert torch.equal(got[0], multiplier) and torch.equal(got[1], scale)


# The one law


@pytest.mark.parametrize("setting", ["4-8-4", "3-8-8", "2-4-16"])
@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_prepared_packed_loaded_and_served(backend, tmp_path, setting, mode):
    config = QATConfig.parse(setting, kv_mode=mode, **GROUPS)
    prepared = prepare(tiny_llama(1, bias=True), config)
    tokens = random_tokens(2, 1, 20)
    expected = logits(prepared, tokens)
    packed = convert(copy.deepcopy(prepared))
    assert torch.equal(logits(packed, tokens), expected)
    loaded = from_pretrained(save_pretrained(packed, tmp_path / "m"))
    assert torch.equal(logits(loaded, tokens), expected)
    verify_export(packed, tmp_path / "m")
    served = [all_logits(Engine(m, max_len=24), tokens[0].tolist()) for m in (prepared, loaded)]
    assert torch.equal(*served)
    # Norms and softmax round differently there; a code that flips costs a step of its grid.
    assert (served[0] - expected[0]).abs().max() < 0.2 * expected.abs().max()


def test_the_engines_native_blocks_and_its_operators_agree():
    model, tokens = packed_llama("4-8-8", seed=3, **GROUPS), random_tokens(4, 1, 12)[0].tolist()
    outputs = [all_logits(Engine(model, max_len=16, fuse=fuse), tokens) for fuse in (True, False)]
    assert torch.equal(*outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_the_engine_on_a_gpu(backend):
    model, tokens = packed_llama("4-8-8", seed=3, **GROUPS), random_tokens(4, 1, 12)[0].tolist()
    expected = all_logits(Engine(model, max_len=16), tokens)
    with qk.use_backend(backend):
        got = all_logits(Engine(model.to("cuda"), max_len=16), tokens).cpu()
    assert (got - expected).abs().max() < 0.2 * expected.abs().max()
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_fused_blocks_train_and_serve_the_same_numbers(tmp_path):
    config = QATConfig.parse("4-8-8", kv_mode="serving", **GROUPS)
    model = prepare(tiny_llama(5), config, fused=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        model(random_tokens(step, 2, 16)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tokens = random_tokens(9, 2, 16)
    expected = logits(model, tokens)
    folder = save_pretrained(convert(model), tmp_path / "m")
    assert torch.equal(logits(from_pretrained(folder), tokens), expected)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_families(name):
    """A Conv1D's view of its weight; norms of heads, which the native blocks do not have."""
    model, tokens = tiny_model(name, 1), random_tokens(1, 1, 12)
    prepared = prepare(model, QATConfig.parse("4-8-8", kv_mode="serving", **GROUPS))
    expected = logits(prepared, tokens)
    packed = convert(prepared)
    assert torch.equal(logits(packed, tokens), expected)
    if name == "qwen3":
        got = all_logits(Engine(packed, max_len=16), tokens[0].tolist())
        assert (got.argmax(-1) == expected[0].argmax(-1)).float().mean() > 0.9


def test_moves_of_dtype_leave_the_grid_alone():
    model = packed_llama(**GROUPS)
    before = {n: m.dequantize() for n, m in linears(model, QuantizedLinear).items()}
    model.to(torch.bfloat16)
    for name, module in linears(model, QuantizedLinear).items():
        assert module.weight_scale.dtype == torch.float32
        assert module.weight_multiplier.dtype == torch.uint8
        assert torch.equal(module.dequantize(), before[name])


# On disk


def test_other_programs_see_scales_of_groups(tmp_path):
    model = packed_llama(**GROUPS)
    folder = save_pretrained(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name, linear = next(iter(linears(model, QuantizedLinear).items()))
    scale = tensors[f"{name}.weight_scale"]
    assert scale.dtype == torch.float32 and torch.equal(scale, linear.scales)
    assert not any("multiplier" in key for key in tensors)
    config = json.loads((folder / "config.json").read_text())
    assert config["llmqat"]["weight_scale_dtype"] == "integer"
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("group", 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s * torch.tensor([1.0] + [1.5] * (s.shape[1] - 1)),
        lambda s: s * 1.001,
        lambda s: s * torch.tensor([1.0] + [1e-4] * (s.shape[1] - 1)),
        lambda s: torch.full_like(s, 3.0),
    ],
    ids=["between multiples", "finer than bfloat16", "below one", "no largest multiplier"],
)
def test_other_scales_are_refused(tmp_path, change):
    folder = save_pretrained(packed_llama(**GROUPS), tmp_path / "m")
    tensor(SCALE, change)(folder)
    refresh(folder)
    refusal = rf"{folder}/model\.safetensors: .*up_proj\.weight_scale: not whole multiples"
    with pytest.raises(CheckpointError, match=refusal):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("buffer", "change", "words"),
    [
        ("weight_scale", lambda s: s * 1.001, "not whole multiples"),
        ("weight_scale", torch.neg, "not finite and positive"),
        ("weight_scale", lambda s: s * float("nan"), "not finite and positive"),
        ("weight_multiplier", lambda m: m.clamp(max=62), "not whole multiples"),
        ("weight_multiplier", lambda m: m * 0, "not finite and positive"),
        ("weight_codes", lambda c: c & 0x88, "code -8 occurs"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, buffer, change, words):
    """The checkpoint that was there stays."""
    model = packed_llama(**GROUPS)
    folder = save_pretrained(model, tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    linear = model.model.layers[0].mlp.up_proj
    setattr(linear, buffer, change(getattr(linear, buffer)))
    with pytest.raises(ConfigError, match=rf"cannot be saved, .*up_proj\..*{words}"):
        save_pretrained(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    from_pretrained(folder)


def test_scales_that_are_no_multiples_are_no_integer_scales():
    """They would become others."""
    codes, scale = qk.quantize(torch.randn(3, 64), 4, group_size=16, scale_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="not whole multiples"):
        QuantizedLinear.from_codes(codes, scale, SPEC)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("scale_dtype", ["integer", "bfloat16"])
def test_rows_of_another_length_are_refused(backend, scale_dtype):
    spec = LinearSpec(QuantSpec(4, 16, scale_dtype), QuantSpec(8))
    packed = QuantizedLinear.from_qat(QATLinear.adopt(nn.Linear(64, 8), spec))
    with qk.use_backend(backend), torch.no_grad():
        for k in (32, 63, 65, 128):
            x = torch.randn(1, k)
            with pytest.raises(qk.InvalidArgument):
                packed(x)
            with pytest.raises(qk.InvalidArgument, match=f"64 features, got {k}"):
                packed(qnn.QuantizedRows.quantize(x, 8))


@pytest.mark.parametrize(
    ("weight", "activation", "words"),
    [
        (QuantSpec(8, 16, "integer"), QuantSpec(8), "w_bits: integer groups hold 2..4 bits"),
        (QuantSpec(4, -1, "integer"), QuantSpec(8), "group_size: -1 has no groups"),
        (QuantSpec(4, 16, "integer"), QuantSpec(16), "need a product of codes"),
    ],
)
def test_linears_without_an_integer_product(weight, activation, words):
    linear = nn.Linear(64, 8)
    with pytest.raises(ConfigError, match=words):
        QATLinear.adopt(linear, LinearSpec(weight, activation))
    assert type(linear) is nn.Linear


def test_values_have_no_gradient():
    linear = QATLinear.adopt(nn.Linear(64, 8), SPEC)
    with pytest.raises(ConfigError, match="no gradient here"):
        linear.fake_quantized_weight(torch.float32)
    with torch.no_grad():
        values = linear.fake_quantized_weight(torch.float32)
    assert torch.equal(values, QuantizedLinear.from_qat(linear).dequantize())


# Settings


@pytest.mark.parametrize(
    ("setting", "fields", "word"),
    [
        ("4-8-8", {"group_size": -1}, "group_size: -1"),
        ("5-8-8", {}, "w_bits: 5"),
        ("8-8-8", {}, "w_bits: 8"),
        ("16-8-8", {}, "w_bits: 16"),
        ("4-16-8", {}, "a_bits: 16"),
        ("4-8-8", {"w_quantizer": "statsq"}, "w_quantizer: 'statsq'"),
        ("4-8-8", {"a_quantizer": "lsq"}, "a_quantizer: 'lsq'"),
        ("4-4-8", {"a_group_size": 4}, "a_group_size: 4"),
    ],
)
def test_settings_without_an_integer_product(setting, fields, word):
    with pytest.raises(ConfigError) as error:
        QATConfig.parse(setting, **{**GROUPS, **fields})
    assert str(error.value).startswith(word) and "integer scales" in str(error.value)


def test_a_row_too_long_for_an_exact_sum_is_refused_before_any_change():
    model = tiny_llama(intermediate=38_400)
    with pytest.raises(ConfigError, match=r"38400 input columns of .*down_proj exceed 38342"):
        prepare(model, QATConfig.parse("4-8-8", **GROUPS))
    assert not linears(model, QATLinear)


def test_bytes():
    config = tiny_llama().config
    integer = weight_bytes(config, QATConfig.parse("4-8-8", **GROUPS))
    floats = weight_bytes(config, QATConfig.parse("4-8-8", group_size=16))
    packed = linears(packed_llama("4-8-8", **GROUPS), QuantizedLinear).values()
    held = sum(m.weight_scale.nbytes + m.weight_multiplier.nbytes for m in packed)
    assert integer.scales == held < floats.scales / 2
    assert integer.linears == floats.linears == sum(m.weight_codes.nbytes for m in packed)


def test_what_it_says_of_itself():
    linear = next(iter(linears(packed_llama(**GROUPS), QuantizedLinear).values()))
    assert "W4A8 g16 integer scales" in repr(linear)


# Post-training


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_chooses_codes_on_these_scales(bits, act_order):
    weight, gram = correlated(6)
    weight[2] = 0
    spec = QuantSpec(bits, 16, "integer")
    codes, scales = gptq_codes(weight, gram, spec, act_order=act_order)
    nearest, multiplier, scale = qk.quantize_integer_groups(weight, bits, group_size=16)
    assert torch.equal(scales, group_scales(scale, multiplier))
    assert torch.equal(split_group_scales(scales)[0], multiplier)

    def error(chosen):
        return output_error(weight, qk.dequantize(chosen, scales, group_size=16), gram)

    assert error(codes) < 0.8 * error(nearest)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_pack_them(tmp_path, method):
    tokens, chosen = random_tokens(1, 4, 32), METHODS[method]
    seen = (tokens,) if "calibration" in chosen.options else ()
    packed = chosen.run(tiny_llama(7), QATConfig.parse("4-8-8", **GROUPS), *seen)
    assert len(linears(packed, QuantizedLinear)) == 14
    loaded = from_pretrained(save_pretrained(packed, tmp_path / "m"))
    assert torch.equal(logits(loaded, tokens), logits(packed, tokens))


# Commands


def test_commands(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "plain")
    scales = ("--group-size", "16", "--weight-scale-dtype", "integer")
    arguments = ("--model", str(tmp_path / "plain"), "--bits", "4-8-8", *scales)
    assert main(["export", *arguments, "--output", str(tmp_path / "p"), "--verify"]) == 0
    assert from_pretrained(tmp_path / "p").llmqat_state.config == QATConfig.parse("4-8-8", **GROUPS)
    capsys.readouterr()
    wrong = ("--model", str(tmp_path / "plain"), "--bits", "8-8-8", *scales)
    assert main(["export", *wrong, "--output", str(tmp_path / "q")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(
        "llmqat export: w_bits: 8 has no integer scales, which need 2..4 bits"
    )


def test_shapes_on_the_meta_device():
    packed = QuantizedLinear.from_qat(QATLinear.adopt(nn.Linear(64, 8), SPEC)).to("meta")
    assert packed(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, 8)
