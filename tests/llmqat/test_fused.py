"""prepare(fused=True): the same model, less kept for backward, and the engine's own bits."""

import copy
import json
import pickle
from statistics import median

import pytest
import torch
from torch import nn
from transformers import StaticCache

import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError
from llmqat.nn.fused import FusedAttention, FusedDecoderLayer
from llmqat.nn.linear import QATLinear
from llmqat.report import conversion_report
from llmqat.state import State, state_of
from llmqat.train.health import HealthMonitor
from llmqat_kernels import use_backend
from tests.llmqat.tiny import random_tokens, tiny_llama

MODES = ("paper", "serving")

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


def fused(seed=0, setting="4-8-4", variant=None, **fields):
    config = QATConfig.parse(setting, **fields)
    return prepare(tiny_llama(seed, **(variant or {})), config, fused=True)


def gradients(model, tokens, **inputs):
    model.zero_grad()
    model(tokens, use_cache=False, **inputs).logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# The same model


@pytest.mark.parametrize("mode", MODES)
def test_objects_parameters_and_names_stay(mode):
    model = tiny_llama()
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    prepare(model, QATConfig.parse("4-8-4", kv_mode=mode), fused=True)
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        assert modules[name] is module or name == "model.rotary_emb"  # every prepare renews it
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert sum(isinstance(m, FusedDecoderLayer) for m in model.modules()) == 2
    assert sum(isinstance(m, QATLinear) for m in model.modules()) == 7 * 2
    assert model._no_split_modules == {"FusedDecoderLayer"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("setting", "variant", "fields"),
    [
        ("4-8-4", {}, {}),
        ("8-8-16", {"kv_heads": 4}, {}),
        ("4-8-8", {"bias": True, "tied": True}, {}),
        ("4-8-4", {"heads": 6, "kv_heads": 3, "intermediate": 100}, {}),
        ("4-8-8", {}, {"group_size": 16}),
        ("4-8-8", {}, {"group_size": 16, "weight_scale_dtype": "integer"}),
        ("4-8-8", {}, {"ste_clip": 1.5}),
        ("4-6-8", {}, {"weight_scale_dtype": "float32"}),
    ],
    ids=["gqa", "mha-kv16", "bias-tied", "odd", "groups", "integer-scales", "clip", "w4a6"],
)
def test_fused_is_unfused_up_to_rounding(mode, setting, variant, fields):
    """Norms differ in the order of a sum, rotation in nothing: where no code flips, outputs and
    gradients agree to fp32 rounding; a flip moves one value by one step.
    """
    config = QATConfig.parse(setting, kv_mode=mode, **fields)
    outputs, grads = [], []
    for seed in range(5):
        plain, tokens = tiny_llama(seed, layers=1, **variant), random_tokens(seed, 2, 8)
        unfused = prepare(copy.deepcopy(plain), config)
        model = prepare(plain, config, fused=True)
        outputs.append(relative(model(tokens).logits, unfused(tokens).logits))
        expected, got = gradients(unfused, tokens), gradients(model, tokens)
        grads.append(max(relative(got[name], expected[name]) for name in expected))
    assert median(outputs) < 1e-5 and median(grads) < 1e-5
    assert max(outputs) < 0.05


class Composed(nn.Module):
    """The fused block of operators one at a time, each consumer quantizing its own input."""

    def __init__(self, block, kv):
        super().__init__()
        self.block, self.kv = block, kv

    def norm(self, norm, x):
        return qk.rms_norm(x, norm.weight, norm.eps)

    def forward(self, x, cos, sin):
        attention, mlp = self.block.self_attn, self.block.mlp
        batch, length, _ = x.shape
        normed = self.norm(self.block.input_layernorm, x)
        q, k, v = (
            linear(normed).view(batch, length, -1, 16)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )

        def rotate(rows):
            half = rows.shape[-1] // 2
            first, second = rows[..., :half], rows[..., half:]
            c, s = (t[..., None, :half] for t in (cos, sin))
            return torch.cat((first * c + (-second) * s, second * c + first * s), -1)

        def quantize(rows):
            shape = rows.shape if self.kv.mode == "serving" else (batch, length, -1)
            return qk.fake_quantize(rows.reshape(shape), self.kv.bits).view(rows.shape)

        k = quantize(rotate(k)) if self.kv.mode == "serving" else rotate(quantize(k))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), k, quantize(v)))
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=True
        )
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        normed = self.norm(self.block.post_attention_layernorm, x)
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        product, _, _ = qk.silu_mul_quantize_train(gate, up, 8)
        return x + mlp.down_proj(product)


@pytest.mark.parametrize("mode", MODES)
def test_block_is_its_operators_one_by_one(backend, mode):
    """Forward and backward, bit for bit: sharing codes changes no number."""
    model = fused(1, kv_mode=mode)
    block = model.model.layers[0]
    x = torch.randn(2, 7, 64, requires_grad=True)
    cos, sin = model.model.rotary_emb(x, torch.arange(7)[None])
    weights = list(block.parameters())
    expected = Composed(block, block.self_attn.quantized_kv)(x, cos, sin)
    got = block(x, position_embeddings=(cos, sin), attention_mask=None)
    assert torch.equal(got, expected)
    grad = torch.randn_like(x)
    want = torch.autograd.grad(expected, [x, *weights], grad)
    have = torch.autograd.grad(got, [x, *weights], grad)
    assert torch.equal(have[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_agree(backend, mode, dtype):
    """Exact operators give exact models: the same logits as the reference, bit for bit."""
    model, tokens = fused(2, kv_mode=mode, variant={"dtype": dtype}), random_tokens(1, 1, 6)
    with torch.no_grad():
        got = model(tokens).logits
        with use_backend("reference"):
            assert torch.equal(model(tokens).logits, got)


def test_gradients_agree_between_backends():
    """Backward is not exact (GEMM order), but close."""
    model, tokens = fused(2), random_tokens(1, 2, 8)
    with use_backend("reference"):
        expected = gradients(model, tokens)
    with use_backend("auto"):
        got = gradients(model, tokens)
    assert max(relative(got[name], expected[name]) for name in expected) < 1e-5


# transformers around it


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["prepared", "packed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate_with_cache_equals_full_forward(mode, stage, implementation):
    """Keys and values enter the cache quantized, each exactly once."""
    model = fused(5, kv_mode=mode, variant={"attn_implementation": implementation})
    if stage == "packed":
        convert(model)
    prompt = random_tokens(2, 3, 7)
    cached = model.generate(prompt, use_cache=True, **GREEDY)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **GREEDY))
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **GREEDY), cached)


@pytest.mark.parametrize("mode", MODES)
def test_left_padding_does_not_change_a_sequence(mode):
    model = fused(6, "4-8-8", kv_mode=mode)
    prompt = random_tokens(3, 1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    alone = model.generate(prompt, **GREEDY)[:, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 9:], alone)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences(mode):
    """position_ids that restart, and differ between the sequences of a batch."""
    model = fused(7, kv_mode=mode)
    a, b = random_tokens(4, 1, 6), random_tokens(5, 1, 8)
    both = torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1)])
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((6, 8), (8, 6))]
    )
    with torch.no_grad():
        packed = model(both, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[0, 6:], model(b).logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed[1, 8:], model(a).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_gives_the_same_gradients(mode, reentrant):
    model, tokens = fused(8, kv_mode=mode).train(), random_tokens(6, 2, 8)
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, tokens)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_weight_codes_once_a_step_with_checkpointing_and_micro_batches(monkeypatch):
    model = fused(8).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls, real = [], qk.quantize

    def counted(x, *args, **kwargs):
        calls.append(x.dim())
        return real(x, *args, **kwargs)

    monkeypatch.setattr(qk, "quantize", counted)
    for seed in range(2):
        model(random_tokens(seed, 1, 8), use_cache=False).logits.mean().backward()
    assert calls == [2] * 14  # the weights, and nothing else by itself


def test_outputs_asked_for():
    model, tokens = fused(variant={"attn_implementation": "eager"}), random_tokens(0, 1, 5)
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and out.attentions[0].shape == (1, 4, 5, 5)


@pytest.mark.parametrize("mode", MODES)
def test_compile_fullgraph(mode):
    model, tokens = fused(1, kv_mode=mode, variant={"layers": 1}), random_tokens(0, 1, 8)
    expected = gradients(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, tokens)
    for name, grad in expected.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], grad, rtol=1e-5, atol=1e-6)
    convert(model)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tokens, use_cache=False).logits, expected)


def test_autocast_is_the_model_in_that_dtype():
    """fp32 masters under bf16 autocast: a bf16 stream, codes of the fp32 weights."""
    model, tokens = fused(3), random_tokens(2, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(tokens, use_cache=False).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    half = copy.deepcopy(model)
    half.model.embed_tokens.bfloat16()  # the stream starts there
    expected = half.model(tokens, use_cache=False).last_hidden_state
    assert torch.equal(hidden, expected)
    hidden.float().square().mean().backward()
    for parameter in model.model.parameters():
        assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_copies_and_pickles(stage):
    model, tokens = fused(4), random_tokens(0, 1, 6)
    if stage == "packed":
        convert(model)
        del model.save_pretrained
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)


# Records and errors


def test_report_and_state():
    model = fused()
    report = conversion_report(model)
    assert report.count("fused") == 2 and report.count("quantized") == 16
    assert "2 blocks fused" in str(report)
    assert State.from_dict(model.config.llmqat) == state_of(model)
    assert model.config.llmqat["fused"] is True
    assert "fused" not in prepare(tiny_llama(), QATConfig.parse("4-8-4")).config.llmqat
    with pytest.raises(ConfigError, match="fused"):
        State.from_dict({**model.config.llmqat, "fused": "yes"})
    model.model.layers[1].mlp.__class__ = type(tiny_llama().model.layers[0].mlp)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp.*LlamaMLP"):
        conversion_report(model)


@pytest.mark.parametrize("setting", ["16-8-4", "4-16-4", "16-16-16"])
def test_nothing_to_share_is_an_error_that_changes_nothing(setting):
    model = tiny_llama()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError, match=r"fused: needs [wa]_bits .* leave fused out"):
        prepare(model, QATConfig.parse(setting), fused=True)
    assert [type(m) for m in model.modules()] == before and state_of(model) is None


def test_other_blocks_and_activations_are_errors():
    config = QATConfig.parse("4-8-4")
    with pytest.raises(ConfigError, match="gelu"):
        prepare(tiny_llama(hidden_act="gelu"), config, fused=True)
    model = tiny_llama()
    model.model.layers[1].__class__ = type("Other", (type(model.model.layers[1]),), {})
    with pytest.raises(ConfigError, match=r"layers\.1 is a Other"):
        prepare(model, config, fused=True)


def test_checkpoint_that_claims_to_be_fused(tmp_path):
    save_pretrained(prepare(tiny_llama(), QATConfig.parse("4-16-4")), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    fields["llmqat"]["fused"] = True
    path.write_text(json.dumps(fields))
    (tmp_path / "model" / "llmqat_manifest.json").unlink()
    with pytest.raises(CheckpointError, match="fused"):
        from_pretrained(tmp_path / "model")


def test_health_counts_shared_codes():
    model, tokens = fused(ste_clip=1.0), random_tokens(0, 1, 8)
    unfused = prepare(tiny_llama(0), QATConfig.parse("4-8-4", ste_clip=1.0))
    reports = []
    for m in (model, unfused):
        monitor = HealthMonitor(m)
        with monitor.watch():
            m(tokens)
        reports.append(monitor.report())
    assert reports[0] == reports[1]


def test_fused_attention_is_a_llama_attention():
    """Tools that look for the library's classes find them."""
    model, original = fused(), tiny_llama()
    for mine, theirs in zip(model.model.layers, original.model.layers, strict=True):
        assert isinstance(mine, type(theirs)) and isinstance(mine.self_attn, FusedAttention)
