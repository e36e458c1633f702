"""Checkpoints: round trips of every kind, the exact layout, atomic replacement, other programs."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_tokens, tiny_llama
from transformers import AutoModelForCausalLM

import llmqat_kernels as qk
from llmqat import io
from llmqat.checkpoint import from_pretrained, save_pretrained, verify_export
from llmqat.checkpoint import save as save_module
from llmqat.checkpoint.format import LinearShape, decode_linear, encode_linear
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError
from llmqat.nn.linear import QuantizedLinear
from llmqat.state import state_of

VARIANTS = [{}, {"kv_heads": 4}, {"tied": True}, {"bias": True}, {"intermediate": 100}]


def equal_models(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


def packed_model(setting="4-8-4", seed=0, variant=None, **fields):
    return convert(tiny_llama(seed, **(variant or {})), QATConfig.parse(setting, **fields))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "prepared", "packed"])
def test_round_trip(tmp_path, variant, kind):
    model = tiny_llama(1, **variant)
    config = QATConfig.parse("4-8-4", kv_mode="serving")
    if kind != "plain":
        prepare(model, config)
    if kind == "packed":
        convert(model)
    assert save_pretrained(model, tmp_path / "m") == tmp_path / "m"
    loaded = from_pretrained(tmp_path / "m")
    assert equal_models(model, loaded) and state_of(loaded) == state_of(model)
    assert not loaded.training
    checked = verify_export(model, tmp_path / "m")
    assert checked.tensors == len(model.state_dict()) and checked.logits == 2 * 16 * 128
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == variant.get("tied", False)


@pytest.mark.parametrize(
    "setting", ["4-8-4", "8-8-8", "4-16-16", "2-8-8", "3-4-16", "6-6-32", "8-16-4"]
)
@pytest.mark.parametrize("fields", [{}, {"group_size": 16}, {"weight_scale_dtype": "float32"}])
def test_settings(tmp_path, setting, fields):
    model = packed_model(setting, kv_mode="paper", **fields)
    save_pretrained(model, tmp_path / "m")
    verify_export(model, tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_dtype_is_kept(tmp_path, dtype):
    model = packed_model(variant={"dtype": dtype, "bias": True})
    save_pretrained(model, tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m")
    assert loaded.dtype == dtype and equal_models(model, loaded)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_dtype_arguments_leave_codes_and_scales_alone(tmp_path):
    model = packed_model(variant={"bias": True}, weight_scale_dtype="float32")
    save_pretrained(model, tmp_path / "m", dtype=torch.bfloat16)
    half = from_pretrained(tmp_path / "m")
    assert half.dtype == torch.bfloat16
    wide = from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert wide.dtype == torch.float32
    linear = model.model.layers[0].mlp.up_proj
    for loaded in (half, wide):
        other = loaded.model.layers[0].mlp.up_proj
        assert torch.equal(other.weight_codes, linear.weight_codes)
        assert torch.equal(other.weight_scale, linear.weight_scale)
        assert other.bias.dtype == loaded.dtype
    for call in (
        lambda: save_pretrained(model, tmp_path / "n", dtype=torch.float64),
        lambda: from_pretrained(tmp_path / "m", dtype=torch.int8),
    ):
        with pytest.raises(ConfigError, match="dtype"):
            call()


def test_layout_w4(tmp_path):
    model = packed_model("4-8-4", kv_mode="serving", variant={"intermediate": 101})
    folder = save_pretrained(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp.down_proj"
    words = tensors[f"{prefix}.weight_packed"]
    assert words.dtype == torch.int32 and words.shape == (64, 13)
    assert tensors[f"{prefix}.weight_shape"].tolist() == [64, 101]
    assert tensors[f"{prefix}.weight_scale"].dtype == torch.bfloat16
    assert tensors[f"{prefix}.weight_scale"].shape == (64, 1)
    codes = model.get_submodule(prefix).int8_codes()
    by_hand = torch.zeros(64, 104, dtype=torch.int64)
    by_hand[:, :101] = codes.long() + 8
    value = sum(by_hand[:, i::8] << (4 * i) for i in range(8))
    assert torch.equal(words.long() & 0xFFFFFFFF, value)
    config = json.loads((folder / "config.json").read_text())
    assert config["llmqat"]["kv_mode"] == "serving" and config["llmqat"]["spec"] == qk.SPEC_VERSION
    quantization = config["quantization_config"]
    assert quantization["kv_cache_scheme"] is None
    assert quantization["quant_method"] == "compressed-tensors"
    group = quantization["config_groups"]["group_0"]
    assert group["format"] == quantization["format"] == "pack-quantized"
    assert group["weights"]["num_bits"] == 4 and group["input_activations"]["num_bits"] == 8
    assert list(folder.glob("*.bin")) == []


def test_layout_w8_and_a16(tmp_path):
    tensors = load_file(
        save_pretrained(packed_model("8-8-8"), tmp_path / "a") / "model.safetensors"
    )
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert "model.layers.0.mlp.up_proj.weight_packed" not in tensors
    folder = save_pretrained(packed_model("4-16-16"), tmp_path / "b")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["input_activations"] is None


def test_scale_dtype_on_disk(tmp_path):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = packed_model(weight_scale_dtype=name)
        tensors = load_file(save_pretrained(model, tmp_path / name) / "model.safetensors")
        assert tensors["model.layers.0.self_attn.q_proj.weight_scale"].dtype == dtype


@pytest.mark.parametrize("k", range(1, 34))
def test_word_packing_of_every_width(k):
    rng = torch.Generator().manual_seed(k)
    codes = torch.randint(-7, 8, (5, k), generator=rng, dtype=torch.int8)
    shape = LinearShape(5, k, 4, -1)
    packed = qk.pack_int4(codes)
    decoded, scale = decode_linear(encode_linear(packed, torch.ones(5), shape), shape, "x")
    assert torch.equal(decoded, packed) and torch.equal(scale, torch.ones(5))


def test_bytes_of_quantized_linears(tmp_path):
    model = tiny_llama(0, heads=4, head_dim=64, intermediate=768)
    floats = sum(p.numel() for n, p in model.named_parameters() if "proj" in n) * 2
    folder = save_pretrained(convert(model, QATConfig.parse("4-8-4")), tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    on_disk = sum(t.nbytes for n, t in stored.items() if "proj" in n)
    in_memory = sum(
        m.weight_codes.nbytes + m.weight_scale.nbytes
        for m in model.modules()
        if isinstance(m, QuantizedLinear)
    )
    assert on_disk <= 0.26 * floats and in_memory <= 0.26 * floats


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_shards(tmp_path, kind):
    model = tiny_llama(2) if kind == "plain" else packed_model(seed=2)
    folder = save_pretrained(model, tmp_path / "m", max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and (folder / "model.safetensors.index.json").is_file()
    verify_export(model, folder)
    save_pretrained(model, folder)  # one file now: the shards of the old one are gone
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    verify_export(model, folder)


def test_transformers_reads_what_we_write(tmp_path):
    model = prepare(tiny_llama(3), QATConfig.parse("4-8-4"))
    save_pretrained(model, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(
        torch.equal(p, dict(model.named_parameters())[n]) for n, p in plain.named_parameters()
    )


def test_we_read_what_transformers_writes(tmp_path):
    """A prepared model saved by transformers (so by any trainer) is prepared again when loaded."""
    model = prepare(tiny_llama(3, tied=True), QATConfig.parse("4-8-4", kv_mode="serving"))
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "training_args.bin").write_bytes(b"pickle")  # never opened
    loaded = from_pretrained(tmp_path / "m")
    assert state_of(loaded) == state_of(model) and equal_models(loaded, model)
    x = random_tokens(1, 1, 8)
    assert torch.equal(loaded(x).logits, model(x).logits)
    tiny_llama(
        4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ).save_pretrained(tmp_path / "n")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    assert torch.equal(from_pretrained(tmp_path / "n")(x).logits, plain(x).logits)


def test_old_config_spelling(tmp_path):
    model = tiny_llama(3, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    folder = save_pretrained(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config.update(rope_scaling=None, torch_dtype=config.pop("dtype"), pad_token_id=-1)
    (folder / "llmqat_manifest.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    x = random_tokens(1, 1, 8)
    assert torch.equal(from_pretrained(folder)(x).logits, model(x).logits)


@pytest.mark.parametrize("setting", ["4-8-8", "4-16-16", "8-8-8", "8-16-8"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_compressed_tensors_reads_our_codes(tmp_path, setting, group_size):
    """transformers through the compressed-tensors library decompresses to exactly our weights."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = packed_model(setting, kv_mode="serving", group_size=group_size)
    folder = save_pretrained(model, tmp_path / "m")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(0, 1, 4)
    with torch.no_grad():
        other(tokens)  # the library may unpack on the first forward
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            theirs = other.get_submodule(name).weight
            assert torch.equal(theirs.float(), module.dequantize()), name


def test_compressed_tensors_packs_the_same_words():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for k in (8, 16, 13, 24, 101):
        codes = torch.randint(-7, 8, (6, k), dtype=torch.int8)
        ours = encode_linear(qk.pack_int4(codes), torch.ones(6), LinearShape(6, k, 4, -1))
        assert torch.equal(ours["weight_packed"], helpers.pack_to_int32(codes, 4))


def test_generation_config_and_tokenizer(tmp_path):
    model = packed_model()
    model.generation_config.eos_token_id = [2, 5]
    model.generation_config.top_k = 7
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "secret.txt").write_text("not a tokenizer file")
    folder = save_pretrained(model, tmp_path / "m", tokenizer=source)
    assert (folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (folder / "secret.txt").exists()
    loaded = from_pretrained(folder)
    assert loaded.generation_config.eos_token_id == [2, 5] and loaded.generation_config.top_k == 7
    with pytest.raises(ConfigError, match="tokenizer"):
        save_pretrained(model, tmp_path / "x", tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        save_pretrained(model, tmp_path / "x", tokenizer=3)
    assert sorted(os.listdir(tmp_path)) == ["m", "tokenizer"]

    class Tokenizer:
        def save_pretrained(self, where):
            with open(os.path.join(where, "tokenizer_config.json"), "w") as file:
                file.write("{}")

    save_pretrained(model, folder, tokenizer=Tokenizer())
    assert (folder / "tokenizer_config.json").read_text() == "{}"
    assert (folder / "tokenizer.json").exists()  # replaced checkpoint's other files stay
    verify_export(model, folder)


def test_replacing_keeps_foreign_files_and_folders(tmp_path):
    folder = save_pretrained(packed_model(seed=1), tmp_path / "m")
    (folder / "notes.md").write_text("mine")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "state").write_text("x")
    model = packed_model("8-8-8", seed=2)
    save_pretrained(model, folder)
    verify_export(model, folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "checkpoint-10" / "state").read_text() == "x"
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("step", ["save_file", "write_json", "sha256", "rename", "rename-back"])
def test_a_failure_loses_nothing(tmp_path, monkeypatch, step):
    old, new = packed_model(seed=1), packed_model("8-8-8", seed=2)
    folder = save_pretrained(old, tmp_path / "m")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "save_file":
        monkeypatch.setattr(save_module, "save_file", fail)
    elif step == "write_json":
        monkeypatch.setattr(io, "write_json", fail)
    elif step == "sha256":
        monkeypatch.setattr(io, "sha256_file", fail)
    else:
        real, calls = os.rename, []

        def rename(source, target):
            calls.append(1)
            if len(calls) == (1 if step == "rename" else 2):
                fail()
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(new, folder)
    monkeypatch.undo()
    verify_export(old, folder)
    assert os.listdir(tmp_path) == ["m"]


def test_interrupted_between_the_renames_is_explained(tmp_path):
    folder = save_pretrained(packed_model(), tmp_path / "m")
    os.rename(folder, tmp_path / ".m.old-01234567")
    with pytest.raises(CheckpointError, match=r"rename \.m\.old-01234567 to m"):
        from_pretrained(folder)


def test_what_cannot_be_loaded_is_not_written(tmp_path):
    model = tiny_llama()
    model.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="hidden_act"):
        save_pretrained(model, tmp_path / "m")
    model = tiny_llama()
    model.config.intermediate_size = 95
    with pytest.raises(ConfigError, match="gate_proj"):
        save_pretrained(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        save_pretrained(tiny_llama(), tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="blocked") as excinfo:
        save_pretrained(tiny_llama(), tmp_path / "blocked" / "m")
    assert "\n" not in str(excinfo.value)


def test_verify_export_finds_a_difference(tmp_path):
    model = packed_model()
    folder = save_pretrained(model, tmp_path / "m")
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight_codes[0, 0] ^= 1
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight_codes differs"):
        verify_export(other, folder)
    with pytest.raises(CheckpointError, match="settings"):
        verify_export(packed_model("8-8-4"), folder)
