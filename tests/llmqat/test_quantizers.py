"""The quantizers of the comparisons (table 4, table 8, released numerics) in linears, models,
checkpoints and training.
"""

import json

import pytest
import torch
from torch import nn

import llmqat
import llmqat_kernels as qk
from llmqat import QATConfig, cli
from llmqat.convert import conversion_report, convert, prepare, state_of
from llmqat.errors import CheckpointError, ConfigError
from llmqat.nn import LinearSpec, QATLinear
from llmqat.nn.linear import INPUT_SCALE, initialize_scales
from llmqat.nn.quantizers import fake_quantize
from llmqat.runtime.engine import Engine
from llmqat.train.arguments import QuantArguments
from llmqat.train.metrics import read_metrics
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.training import build_trainer, logged, token_rows

OTHERS = {
    "asymmetric": {"w_quantizer": "asymmetric", "a_quantizer": "asymmetric"},
    "clipped": {"w_quantizer": "statsq", "a_quantizer": "lsq"},
    "mixed": {"w_quantizer": "asymmetric", "group_size": 8},
    "official": {"numerics": "official", "a_quantizer": "asymmetric"},
    "channels": {"a_group_size": 4},
    "channels per token": {"a_group_size": 8, "a_group_axis": "channel_per_token"},
}


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


def linear(setting="4-8-16", k=24, n=10, is_kv=False, **fields):
    torch.manual_seed(0)
    spec = LinearSpec.from_config(QATConfig.parse(setting, **fields), is_kv=is_kv)
    return QATLinear.adopt(nn.Linear(k, n), spec)


def product(layer, x, weight):
    return nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_multiply_the_values_of_their_quantizers(dtype):
    x = torch.randn(2, 5, 24).to(dtype)

    layer = linear(**OTHERS["asymmetric"]).to(dtype)
    weight = qk.fake_quantize_asymmetric(layer.weight, 4, scale_dtype=torch.bfloat16)
    want = product(layer, qk.fake_quantize_asymmetric(x, 8), weight)
    assert torch.equal(layer(x), want)

    layer = linear(**OTHERS["clipped"]).to(dtype)
    weight = qk.fake_quantize_statsq(layer.weight, 4, scale_dtype=torch.bfloat16)
    want = product(layer, qk.fake_quantize_lsq(x, qk.lsq_scale(x, 8), 8), weight)
    assert torch.equal(layer(x), want)

    layer = linear(**OTHERS["mixed"]).to(dtype)
    weight = qk.fake_quantize_asymmetric(layer.weight, 4, group_size=8, scale_dtype=torch.bfloat16)
    assert torch.equal(layer(x), product(layer, qk.fake_quantize(x, 8), weight))

    layer = linear("4-4-16", **OTHERS["channels"]).to(dtype)
    weight = qk.fake_quantize(layer.weight, 4, scale_dtype=torch.bfloat16)
    want = product(layer, qk.fake_quantize_channels(x, 4, group_size=4), weight)
    assert torch.equal(layer(x), want)

    layer = linear("4-4-16", **OTHERS["channels per token"]).to(dtype)
    want = product(layer, qk.fake_quantize(x, 4, group_size=8), weight)
    assert torch.equal(layer(x), want)


def test_official_weights_of_two_bits_are_statsq():
    """Only weights: that code has min-max for activations and KV at every width."""
    layer, x = linear("2-2-16", numerics="official"), torch.randn(3, 24)
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = layer.to(dtype), x.to(dtype)
        weight = qk.fake_quantize_official(layer.weight, 2, statsq=True)
        assert not (weight == 0).any()
        assert torch.equal(layer(x), product(layer, qk.fake_quantize_official(x, 2), weight))
    assert "w:statsq" in layer.extra_repr() and layer.extra_repr().endswith("official")


def test_official_numerics_quantize_in_the_dtype_of_the_input():
    layer, x = linear("4-8-16", **OTHERS["official"]), torch.randn(3, 24)
    assert layer.spec.ste_clip == 2.0
    narrow = qk.fake_quantize_official(layer.weight.to(torch.bfloat16), 4)
    values = qk.fake_quantize_official(x.to(torch.bfloat16), 8, asymmetric=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), product(layer, values, narrow))
    sixteen = linear("16-16-16", numerics="official")
    assert sixteen.spec.enabled and not linear("32-32-16", numerics="official").spec.enabled
    assert torch.equal(
        sixteen(x),
        product(
            sixteen,
            qk.fake_quantize_official(x, 16),
            qk.fake_quantize_official(sixteen.weight, 16),
        ),
    )


def test_every_parameter_gets_a_gradient():
    for fields in OTHERS.values():
        layer = linear("4-4-16", **fields)
        layer(torch.randn(6, 24)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_keys_and_values_of_the_paper_mode():
    plain, x = linear("4-8-4"), torch.randn(3, 24)
    asymmetric = linear("4-8-4", is_kv=True, kv_quantizer="asymmetric")
    assert torch.equal(asymmetric(x), qk.fake_quantize_asymmetric(plain(x), 4))
    assert "out:asymmetric" in repr(asymmetric)


def test_keys_and_values_of_the_serving_mode():
    model = prepare(
        tiny_llama(), QATConfig.parse("16-16-4", kv_mode="serving", kv_quantizer="asymmetric")
    )
    other = prepare(tiny_llama(), QATConfig.parse("16-16-4", kv_mode="serving"))
    ids = random_tokens(0, 2, 12)
    full = tiny_llama()(ids).logits
    own, symmetric = ((m(ids).logits - full).abs().mean() for m in (model, other))
    assert 0 < own < symmetric  # 16 levels instead of 15, and no sign to waste
    with pytest.raises(ConfigError, match="kv_quantizer"):
        Engine(model)


def test_learned_scale_is_set_by_the_first_input_and_kept():
    layer = linear(a_quantizer="lsq")
    assert list(layer.state_dict()) == ["weight", "bias", INPUT_SCALE]
    assert layer.input_scale.tolist() == [0.0]
    x = torch.randn(7, 24)
    layer(x)
    first = layer.input_scale.detach().clone()
    assert torch.equal(first, qk.lsq_scale(x, 8))
    layer(x * 100)
    assert torch.equal(layer.input_scale, first)
    assert layer.to(torch.bfloat16).input_scale.dtype == torch.float32
    assert torch.equal(layer.input_scale, first)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_learned_scale_is_not_set_by_an_input_that_is_not_finite():
    layer = linear(a_quantizer="lsq")
    assert layer(torch.full((2, 24), float("inf"))).isnan().all()
    assert layer.input_scale.tolist() == [0.0]
    assert torch.isfinite(layer(torch.randn(2, 24))).all()
    assert layer.input_scale.item() > 0


def test_initialize_scales_sets_what_is_not_set():
    model = prepare(tiny_llama().train(), QATConfig.parse("4-8-16", a_quantizer="lsq"))
    ids = random_tokens(0, 1, 16)
    initialize_scales(model, ids)
    scales = {n: p.item() for n, p in model.named_parameters() if n.endswith(INPUT_SCALE)}
    assert len(scales) == 14 and all(s > 0 for s in scales.values()) and model.training
    initialize_scales(model, random_tokens(1, 1, 16))
    assert scales == {n: p.item() for n, p in model.named_parameters() if n in scales}
    initialize_scales(tiny_llama(), ids)


@pytest.mark.parametrize("name", OTHERS)
def test_models_prepare_report_and_round_trip(name, tmp_path):
    config = QATConfig.parse("4-4-16", **OTHERS[name])
    model, ids = prepare(tiny_llama(), config), random_tokens(0, 2, 12)
    want = model(ids).logits
    assert torch.isfinite(want).all()
    assert conversion_report(model).setting == "4-4-16"
    llmqat.save_pretrained(model, tmp_path / "m")
    again = llmqat.from_pretrained(tmp_path / "m")
    assert state_of(again).config == config
    assert torch.equal(again(ids).logits, want)
    with pytest.raises(ConfigError, match="exists as fake quantization only"):
        convert(again)
    with pytest.raises(ConfigError, match="has no engine form"):
        Engine(again)
    with pytest.raises(ConfigError, match="has no fused form"):
        prepare(tiny_llama(), config, fused=True)


def test_learned_scales_stay_fp32_in_any_checkpoint(tmp_path):
    model = prepare(tiny_llama(), QATConfig.parse("4-8-16", a_quantizer="lsq"))
    llmqat.save_pretrained(model, tmp_path / "unset")
    assert llmqat.from_pretrained(tmp_path / "unset").model.layers[0].mlp.up_proj.input_scale == 0
    model(random_tokens(0, 1, 12))
    scales = {n: t for n, t in model.state_dict().items() if n.endswith(INPUT_SCALE)}
    llmqat.save_pretrained(model, tmp_path / "half", dtype=torch.bfloat16)
    for dtype in (None, torch.bfloat16):
        again = llmqat.from_pretrained(tmp_path / "half", dtype=dtype)
        assert again.dtype == torch.bfloat16
        for name, scale in scales.items():
            assert torch.equal(again.state_dict()[name], scale)


def test_a_checkpoint_without_its_learned_scales_is_refused(tmp_path):
    llmqat.save_pretrained(prepare(tiny_llama(), QATConfig.parse("4-8-16")), tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert "a_quantizer" not in fields["llmqat"]  # written only where it says something
    fields["llmqat"]["a_quantizer"] = "lsq"
    path.write_text(json.dumps(fields))
    (tmp_path / "llmqat_manifest.json").unlink()
    with pytest.raises(CheckpointError, match="input_scale is missing"):
        llmqat.from_pretrained(tmp_path)


def test_learned_scales_train_and_resume(tmp_path):
    config = QATConfig.parse("4-8-8", **OTHERS["clipped"])

    def run(folder, steps):
        teacher, student = tiny_llama(tied=True), prepare(tiny_llama(tied=True), config)
        initialize_scales(student, token_rows(1)[0]["input_ids"].unsqueeze(0))
        start = {n: p.detach().clone() for n, p in student.named_parameters()}
        trainer = build_trainer(folder, steps=6, student=student, teacher=teacher, save_steps=3)
        trainer.train(resume_from_checkpoint=steps)
        moved = [n for n, p in student.named_parameters() if not torch.equal(p, start[n])]
        assert sum(n.endswith(INPUT_SCALE) for n in moved) == 14
        return {n: p.detach().clone() for n, p in student.named_parameters()}

    whole = run(tmp_path / "run", None)
    assert len(logged(tmp_path / "run")) == 6
    resumed = run(tmp_path / "run", str(tmp_path / "run" / "checkpoint-3"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_channel_groups_see_all_tokens():
    """One scale over all tokens: a token's logits depend on those after it."""
    ids = random_tokens(0, 1, 12)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 127 + 1
    for name, same in (("channels", False), ("channels per token", True)):
        model = prepare(tiny_llama(), QATConfig.parse("4-4-16", **OTHERS[name]))
        first, second = (model(x).logits[:, :-1] for x in (ids, changed))
        assert torch.equal(first, second) is same


def test_smaller_groups_are_finer():
    full, ids = tiny_llama(), random_tokens(0, 2, 16)
    want = torch.log_softmax(full(ids).logits, -1)
    errors = []
    for fields in ({}, {"a_group_size": 16}, {"a_group_size": 4}):
        axis = {"a_group_axis": "channel_per_token"} if fields else {}
        model = prepare(tiny_llama(), QATConfig.parse("16-4-16", **fields, **axis))
        own = torch.log_softmax(model(ids).logits, -1)
        errors.append((want.exp() * (want - own)).sum(-1).mean().item())
    assert errors[0] > errors[1] > errors[2]


def with_outliers(model):
    """What trained language models have and random ones lack: channels far above the others,
    which the linears that read them depend on.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[int(torch.randint(norm.weight.numel(), (), generator=generator))] *= 40
    return model


def test_clipping_is_far_worse_than_min_max_before_training():
    """LLM-QAT table 4: clipping cuts the outliers that the logits depend on (perplexity above
    10,000 at the start of training); min-max keeps them.
    """
    ids = random_tokens(0, 4, 24)
    want = torch.log_softmax(with_outliers(tiny_llama())(ids).logits, -1)

    def divergence(**fields):
        model = prepare(with_outliers(tiny_llama()), QATConfig.parse("8-8-16", **fields))
        own = torch.log_softmax(model(ids).logits, -1)
        return (want.exp() * (want - own)).sum(-1).mean().item()

    min_max = divergence()
    asymmetric = divergence(w_quantizer="asymmetric", a_quantizer="asymmetric")
    for clipped in (
        {"a_quantizer": "lsq"},
        {"w_quantizer": "statsq"},
        {"w_quantizer": "statsq", "a_quantizer": "lsq"},
    ):
        lost = divergence(**clipped)
        assert lost > 5 * min_max and lost > 3 * asymmetric


def test_options_of_the_command_line():
    config = QuantArguments(
        bits="4-8-4",
        w_quantizer="statsq",
        a_quantizer="lsq",
        kv_quantizer="asymmetric",
    ).to_config()
    assert (config.w_quantizer, config.a_quantizer) == ("statsq", "lsq")
    assert config.kv_quantizer == "asymmetric"
    config = QuantArguments(bits="4-4-4", a_group_size=1, a_group_axis="channel_per_token")
    assert config.to_config().a_group_size == 1
    assert QuantArguments(bits="4-8-4", numerics="official").to_config().ste_clip == 2.0
    assert QuantArguments(bits="4-8-4", numerics="official", ste_clip=5.0).to_config().ste_clip == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("plain")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    llmqat.save_pretrained(tiny_llama(tied=True), root / "model", tokenizer=tokenizer)
    ids = random_tokens(3, 1, 200)[0].tolist()
    (root / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    return root


def test_eval_and_train_commands(folder, tmp_path, capsys):
    model, text = str(folder / "model"), str(folder / "text.txt")
    options = ["--bits", "4-8-8", "--w-quantizer", "statsq", "--a-quantizer", "lsq"]
    options += ["--kv-quantizer", "asymmetric"]
    common = ["eval", "--text", text, "--seq-len", "32", "--json"]
    assert cli.main([*common, "--model", model, *options]) == 0
    start = json.loads(capsys.readouterr().out)["nll"]
    train = ["train", "--model", model, "--data", text, "--output", str(tmp_path / "out")]
    train += ["--steps", "4", "--lr", "1e-3", "--seq-len", "32", *options]
    assert cli.main(train) == 0
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 4
    capsys.readouterr()
    assert cli.main([*common, "--model", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["nll"] != start
    refused = ["quantize", "--model", model, "--output", str(tmp_path / "packed")]
    assert cli.main([*refused, "--method", "rtn", *options]) == 1
    assert "w_quantizer: 'statsq' exists as fake quantization only" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_a_run_from_before_these_options_resumes(folder, tmp_path):
    model, text = str(folder / "model"), str(folder / "text.txt")
    train = ["train", "--model", model, "--data", text, "--output", str(tmp_path / "out")]
    train += ["--steps", "2", "--seq-len", "32", "--bits", "4-8-8"]
    assert cli.main(train) == 0
    path = tmp_path / "out" / "llmqat_run.json"
    record = json.loads(path.read_text())
    for name in ("w_quantizer", "a_quantizer", "kv_quantizer", "numerics", "a_group_size"):
        del record["config"][name]
    del record["arguments"]["fused"]
    path.write_text(json.dumps(record))
    assert cli.main([*train, "--resume"]) == 0
    assert cli.main([*train, "--resume", "--w-quantizer", "statsq"]) == 1


def test_fake_quantize_leaves_what_is_off():
    x = torch.randn(2, 4)
    assert fake_quantize(x, QATConfig.parse("16-16-16").activation) is x
