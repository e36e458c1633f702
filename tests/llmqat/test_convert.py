"""prepare and convert: every module accounted for, clear errors, nothing shared or half done."""

import copy

import pytest
import torch
from tiny import random_tokens, tiny_llama
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaForCausalLM, LlamaModel

import llmqat
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError
from llmqat.nn.linear import QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.report import conversion_report
from llmqat.state import State, state_of

W4A8KV4 = QATConfig.parse("4-8-4")


def snapshot(model):
    return [(name, type(module)) for name, module in model.named_modules()], state_of(model)


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("variant", [{}, {"kv_heads": 4}, {"tied": True}, {"bias": True}])
def test_every_linear_and_only_those(mode, variant):
    model = tiny_llama(**variant)
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    prepared = prepare(model, QATConfig.parse("4-8-4", kv_mode=mode))
    assert prepared is model and list(model.state_dict()) == keys
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert sum(isinstance(m, QATLinear) for m in model.modules()) == 7 * 2
    assert type(model.lm_head) is nn.Linear
    report = conversion_report(model)
    assert {e.name for e in report.entries} >= {
        name for name, module in model.named_modules() if not list(module.children())
    }
    assert report.count("quantized") == 8 * 2
    convert(model)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 7 * 2
    assert conversion_report(model).count("quantized") == 8 * 2
    assert "packed 4-8-4: 16 quantized" in str(conversion_report(model))


def test_report_says_why_things_are_kept():
    details = {e.name: e.detail for e in conversion_report(prepare(tiny_llama(), W4A8KV4)).entries}
    assert "embeddings" in details["model.embed_tokens"]
    assert "head" in details["lm_head"]
    assert "norms" in details["model.norm"]
    assert "no weights" in details["model.rotary_emb"]
    assert "out4" in details["model.layers.0.self_attn.k_proj"]


def test_report_finds_a_layer_that_was_lost():
    model = prepare(tiny_llama(), W4A8KV4)
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        conversion_report(model)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        convert(model)


def test_report_finds_lost_kv_quantization():
    config = QATConfig.parse("4-8-4", kv_mode="serving")
    model = prepare(tiny_llama(), config)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="attention"):
        conversion_report(model)
    model = prepare(tiny_llama(), config)
    del model.model.layers[0].self_attn.llmqat_kv
    with pytest.raises(ConfigError, match="quantizer"):
        conversion_report(model)
    with pytest.raises(ConfigError, match="neither"):
        conversion_report(tiny_llama())


def test_errors_leave_the_model_alone():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(96, 64))
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj: .*Sequential"):
        prepare(model, W4A8KV4)
    assert snapshot(model) == before
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="group_size"):
        prepare(model, QATConfig.parse("4-8-4", group_size=48))
    for setting in ("16-8-8", "4-8-6"):
        with pytest.raises(ConfigError, match=r"w_bits|kv_bits"):
            convert(model, QATConfig.parse(setting))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj.*infinite"):
        convert(model, W4A8KV4)
    assert snapshot(model) == before


def test_missing_linear():
    model = tiny_llama()
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(ConfigError, match=r"mlp\.up_proj"):
        prepare(model, W4A8KV4)


def test_wrong_order_is_an_error():
    with pytest.raises(ConfigError, match="not prepared"):
        convert(tiny_llama())
    model = prepare(tiny_llama(), W4A8KV4)
    with pytest.raises(ConfigError, match="already prepared"):
        prepare(model, W4A8KV4)
    with pytest.raises(ConfigError, match="other settings"):
        convert(model, QATConfig.parse("8-8-4"))
    convert(model, W4A8KV4)
    with pytest.raises(ConfigError, match="already converted"):
        convert(model)
    with pytest.raises(ConfigError, match="already packed"):
        prepare(model, W4A8KV4)
    with pytest.raises(ConfigError, match=r"llmqat\.save_pretrained"):
        model.save_pretrained("anywhere")


def test_unsupported_models_are_named():
    gemma = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    with pytest.raises(ConfigError, match=r"GemmaForCausalLM.*supported: LlamaForCausalLM"):
        prepare(gemma, W4A8KV4)
    with pytest.raises(ConfigError, match="LlamaModel"):
        prepare(LlamaModel(tiny_llama().config), W4A8KV4)
    with pytest.raises(ConfigError, match="Linear"):
        prepare(nn.Linear(2, 2), W4A8KV4)
    with pytest.raises(ConfigError, match="QATConfig"):
        prepare(tiny_llama(), "4-8-4")


@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_teacher_with_the_same_config_object_is_untouched(mode):
    teacher = tiny_llama()
    student = LlamaForCausalLM(teacher.config).eval()
    student.load_state_dict(teacher.state_dict())
    assert student.config is teacher.config
    x = random_tokens(0, 2, 12)
    before = teacher(x).logits
    prepare(student, QATConfig.parse("4-8-4", kv_mode=mode))
    assert torch.equal(teacher(x).logits, before)
    assert not hasattr(teacher.config, "llmqat")
    assert not torch.equal(student(x).logits, before)


def test_state_is_recorded_and_read_back():
    model = prepare(tiny_llama(), W4A8KV4)
    assert State.from_dict(model.config.llmqat) == state_of(model) == State("prepared", W4A8KV4)
    convert(model)
    assert State.from_dict(model.config.llmqat) == State("packed", W4A8KV4)
    section = model.config.llmqat
    for change in (
        {"spec": "lq-9"},
        {"stage": "cooked"},
        {"more": 1},
        {"w_bits": 1},
        {"spec": None},
    ):
        with pytest.raises(ConfigError):
            State.from_dict({**section, **change})
    with pytest.raises(ConfigError):
        State.from_dict([])


def test_all_off_changes_nothing():
    model = tiny_llama()
    x = random_tokens(0, 1, 9)
    before = model(x).logits
    prepare(model, QATConfig.parse("16-16-16", kv_mode="serving"))
    assert torch.equal(model(x).logits, before)
    assert not any(isinstance(m, QATLinear) for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert conversion_report(model).count("quantized") == 0


def test_round_to_nearest_is_prepare_then_convert():
    model, x = tiny_llama(3), random_tokens(0, 2, 10)
    expected = convert(prepare(copy.deepcopy(model), W4A8KV4))(x).logits
    assert torch.equal(convert(model, W4A8KV4)(x).logits, expected)


def test_package_names():
    """`llmqat.convert` is the function, whatever was imported before."""
    model = llmqat.convert(llmqat.prepare(tiny_llama(), W4A8KV4))
    assert llmqat.conversion_report(model).stage == "packed"
    assert llmqat.QATConfig is QATConfig


@pytest.mark.parametrize(("stage", "mode"), [(prepare, "serving"), (convert, "paper")])
def test_compile_fullgraph(stage, mode):
    model = stage(tiny_llama(layers=1), QATConfig.parse("4-8-4", kv_mode=mode))
    x = random_tokens(0, 1, 8)
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, use_cache=False).logits, expected)


def test_compile_training_gives_the_same_gradients():
    model = prepare(tiny_llama(layers=1), W4A8KV4)
    x = random_tokens(0, 1, 8)
    model(x, use_cache=False).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, use_cache=False).logits.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)
