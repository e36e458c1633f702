"""Every family: trains, converts, is saved and loaded, evaluates, takes post-training methods."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_tokens
from tiny_families import tiny_model
from torch import nn

from llmqat.checkpoint import from_pretrained, save_pretrained, verify_export
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError
from llmqat.eval.cost import ModelShape, weight_bytes
from llmqat.eval.perplexity import perplexity
from llmqat.models.families import FAMILIES, find_family, iter_blocks, iter_linears
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.ptq import awq, gptq, rtn, smooth, smoothquant, zeroquant
from llmqat.ptq.lorc import compensate, float_weights
from llmqat.report import conversion_report
from llmqat_kernels import fake_quantize
from tests.llmqat.training import build_trainer, logged

NAMES = list(FAMILIES)
pytestmark = pytest.mark.usefixtures("on_reference")


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("name", NAMES)
def test_train_convert_save_load(name, mode, tmp_path):
    model = tiny_model(name)
    family, names = find_family(model), [n for n, _ in model.named_parameters()]
    x = random_tokens(0, 2, 12)
    before = model(x).logits
    prepare(model, QATConfig.parse("4-8-4", kv_mode=mode))
    assert [n for n, _ in model.named_parameters()] == names
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(x, labels=x, use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    codes = {n: m.weight_codes()[0].clone() for n, _, m in iter_linears(model, family)}
    optimizer.step()
    model.eval()
    changed = [
        n for n, _, m in iter_linears(model, family) if (m.weight_codes()[0] != codes[n]).any()
    ]
    assert changed == list(codes)  # every linear learns, and no code is kept for too long
    with torch.no_grad():
        trained = model(x, use_cache=False).logits
        assert not torch.equal(trained, before)
        save_pretrained(model, tmp_path / "prepared")
        assert torch.equal(from_pretrained(tmp_path / "prepared")(x).logits, trained)
        convert(model)
        assert torch.equal(model(x, use_cache=False).logits, trained)
    save_pretrained(model, tmp_path / "packed")
    verify_export(model, tmp_path / "packed", tokens=x)
    report = conversion_report(from_pretrained(tmp_path / "packed"))
    assert report.count("quantized") == 2 * (len(family.linears) + 1)


@pytest.mark.parametrize("setting", ["4-16-16", "16-8-8", "8-8-16"])
@pytest.mark.parametrize("name", NAMES)
def test_prepared_equals_converted(name, setting):
    model = prepare(tiny_model(name, 1), QATConfig.parse(setting, kv_mode="serving"))
    x = random_tokens(1, 1, 9)
    with torch.no_grad():
        expected = model(x).logits
        assert not torch.equal(expected, tiny_model(name, 1)(x).logits)
        if setting != "16-8-8":
            assert torch.equal(convert(model)(x).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_equals_the_full_forward(name):
    """Each K and V has the same codes in every step, whichever module quantizes it."""
    x = random_tokens(2, 1, 14)
    for mode in ("paper", "serving"):
        model = convert(tiny_model(name), QATConfig.parse("8-8-4", kv_mode=mode))
        with torch.no_grad():
            full = model(x, use_cache=False).logits
            past, rows = None, []
            for part in (x[:, :9], x[:, 9:10], x[:, 10:]):
                output = model(part, past_key_values=past, use_cache=True)
                past = output.past_key_values
                rows.append(output.logits)
        torch.testing.assert_close(torch.cat(rows, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_plain_folder_is_what_transformers_writes(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m")
    x = random_tokens(3, 1, 10)
    assert torch.equal(loaded(x).logits, model(x).logits)
    again = save_pretrained(loaded, tmp_path / "again")
    theirs = type(model).from_pretrained(again)
    assert torch.equal(theirs(x).logits, model(x).logits)
    result = perplexity(loaded, random_tokens(4, 1, 64).flatten().tolist(), seq_len=16)
    assert result.perplexity > 1


@pytest.mark.parametrize("name", NAMES)
def test_fused_is_for_llama(name):
    config = QATConfig.parse("8-8-8")
    if name == "llama":
        prepare(tiny_model(name), config, fused=True)
    else:
        with pytest.raises(ConfigError, match=r"fused: blocks of .* not supported"):
            prepare(tiny_model(name), config, fused=True)


@pytest.mark.parametrize("name", NAMES)
def test_cost_counts_the_model_itself(name):
    model = tiny_model(name)
    shape = ModelShape.from_config(model.config)
    family = find_family(model)
    linears = sum(module.weight.numel() for _, _, module in iter_linears(model, family))
    assert shape.linear_parameters() == linears
    assert shape.tied == model.config.tie_word_embeddings
    found = weight_bytes(model.config, QATConfig.parse("16-16-16"), float_bits=32)
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    norms = [
        p.numel()
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters()
    ]
    assert found.embedding == 4 * sum(w.numel() for w in embeddings)
    assert found.norms == 4 * sum(norms)


@pytest.mark.parametrize("name", NAMES)
def test_post_training_methods(name):
    config = QATConfig.parse("4-8-16")
    tokens, x = random_tokens(5, 4, 16), random_tokens(6, 1, 8)
    plain = tiny_model(name)(x).logits
    smoothed = smooth(tiny_model(name), tokens)
    torch.testing.assert_close(smoothed(x).logits, plain, rtol=1e-3, atol=1e-3)
    for method in (
        lambda model: rtn(model, config),
        lambda model: gptq(model, config, tokens),
        lambda model: smoothquant(model, config, tokens),
        lambda model: awq(model, config, tokens, grid=3),
        lambda model: zeroquant(model, config, tokens, steps=2),
    ):
        packed = method(tiny_model(name))
        linears = [m for _, _, m in iter_linears(packed, find_family(packed))]
        assert all(isinstance(m, QuantizedLinear) for m in linears)
        assert bool(packed(x).logits.isfinite().all())


def test_gptq_beats_rounding_on_conv1d():
    """The columns that GPTQ works on are a Conv1D's inputs, not its outputs."""
    config, tokens = QATConfig.parse("3-16-16"), random_tokens(7, 16, 32)
    plain = tiny_model("gpt2")(tokens).logits
    errors = [
        float((method(tiny_model("gpt2"))(tokens).logits - plain).detach().square().mean())
        for method in (lambda m: gptq(m, config, tokens), lambda m: rtn(m, config))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_low_rank_compensation(name):
    model, tokens = tiny_model(name), random_tokens(11, 2, 16)
    plain, weights = model(tokens).logits, float_weights(model)
    rtn(model, QATConfig.parse("3-16-16"))
    with torch.no_grad():
        before = (model(tokens).logits - plain).square().mean()
        after = (compensate(model, weights, 32)(tokens).logits - plain).square().mean()
    assert after < 0.5 * before


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_trainer(name, tmp_path):
    """Logits distillation with checkpointed activations: the trainer asks nothing of a family."""
    teacher = tiny_model(name)
    student = prepare(tiny_model(name), QATConfig.parse("4-8-4"))
    options = {"teacher": teacher, "student": student, "gradient_checkpointing": True}
    build_trainer(tmp_path, steps=2, save_steps=2, **options).train()
    entries = [entry for entry in logged(tmp_path) if "loss" in entry]
    assert len(entries) == 2 and all(0 < entry["loss"] < 20 for entry in entries)
    loaded, x = from_pretrained(tmp_path / "checkpoint-2"), random_tokens(12, 1, 8)
    assert torch.equal(loaded(x).logits, student.eval()(x).logits)


def test_folds_that_gpt2_cannot_have():
    for folds in ("norms+down", "all"):
        with pytest.raises(ConfigError, match=r"folds: .*GPT2LMHeadModel.* use norms"):
            smooth(tiny_model("gpt2"), random_tokens(0, 1, 8), folds=folds)
        with pytest.raises(ConfigError, match=r"folds: .*GPT2LMHeadModel.* use norms"):
            awq(tiny_model("gpt2"), QATConfig.parse("4-8-16"), random_tokens(0, 1, 8), folds=folds)


def test_awq_takes_the_widest_folds_of_the_family():
    config, tokens, x = QATConfig.parse("4-8-16"), random_tokens(0, 4, 16), random_tokens(6, 1, 8)
    for name, folds in (("gpt2", "norms"), ("llama", "all")):
        default, asked = (
            awq(tiny_model(name), config, tokens, grid=3, **options)
            for options in ({}, {"folds": folds})
        )
        assert torch.equal(default(x).logits, asked(x).logits)


def test_gpt2_paper_kv_is_one_scale_per_token():
    """The k and v thirds of c_attn's output, each rounded as one row per token."""
    plain, model = tiny_model("gpt2"), tiny_model("gpt2")
    prepare(model, QATConfig.parse("16-16-4"))

    def quantize(module, args, output):
        q, k, v = output.split(64, dim=2)
        return torch.cat([q, fake_quantize(k, 4), fake_quantize(v, 4)], dim=2)

    for _, block in iter_blocks(plain, find_family(plain)):
        block.attn.c_attn.register_forward_hook(quantize)
    x = random_tokens(8, 2, 11)
    assert torch.equal(model(x).logits, plain(x).logits)


def test_asymmetric_quantizers_on_gpt2():
    for fields in ({"a_quantizer": "asymmetric"}, {"w_quantizer": "asymmetric"}):
        config = QATConfig.parse("4-4-4", **fields)
        model = prepare(tiny_model("gpt2"), config)
        x = random_tokens(9, 1, 8)
        loss = model(x, labels=x).loss
        loss.backward()
        assert bool(loss.isfinite())
        assert all(p.grad is not None for p in model.parameters())


def test_gpt2_names_of_the_hub(tmp_path):
    """The published files: no prefix, no head, and a mask in every block."""
    model = tiny_model("gpt2")
    folder = save_pretrained(model, tmp_path / "m")
    (folder / "llmqat_manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    hub = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for index in range(2):
        hub[f"h.{index}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    x = random_tokens(10, 1, 8)
    assert torch.equal(from_pretrained(folder)(x).logits, model(x).logits)
    hub["h.0.attn.other"] = torch.ones(1)
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensor h\.0\.attn\.other"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
        ("qwen3", {"head_dim": 3}, "head_dim"),
        ("qwen3", {"attention_bias": False}, "proj.bias"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_positions": 128}, "wpe"),
        ("gpt2", {"resid_pdrop": "x"}, "resid_pdrop"),
    ],
)
def test_configs_that_are_refused(name, change, message, tmp_path):
    folder = save_pretrained(tiny_model(name), tmp_path / "m")
    (folder / "llmqat_manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)
