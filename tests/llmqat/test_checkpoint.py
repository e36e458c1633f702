"""Checkpoints: round trips of every kind, the exact layout, atomic replacement, other programs."""

import copy
import json
import os
import shutil

import pytest
import torch
from tiny import packed_llama, random_tokens, tiny_llama
from transformers import AutoModelForCausalLM

from llmqat import io
from llmqat.checkpoint import from_pretrained, save_pretrained, verify_export
from llmqat.checkpoint import save as save_module
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError
from llmqat.state import state_of

VARIANTS = [{}, {"kv_heads": 4}, {"tied": True}, {"bias": True}, {"intermediate": 100}]


def equal_models(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


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
    shapes = from_pretrained(tmp_path / "m", device="meta")
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())
    for name, tensor in shapes.state_dict().items():
        stored = model.state_dict()[name]
        assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype)
    assert shapes.state_dict().keys() == model.state_dict().keys()
    assert state_of(shapes) == state_of(model) and not shapes.model.rotary_emb.inv_freq.is_meta
    assert (shapes.lm_head.weight is shapes.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "setting", ["4-8-4", "8-8-8", "4-16-16", "2-8-8", "3-4-16", "6-6-32", "8-16-4"]
)
@pytest.mark.parametrize("fields", [{}, {"group_size": 16}, {"weight_scale_dtype": "float32"}])
def test_settings(tmp_path, setting, fields):
    model = packed_llama(setting, kv_mode="paper", **fields)
    save_pretrained(model, tmp_path / "m")
    verify_export(model, tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_dtype_is_kept(tmp_path, dtype):
    model = packed_llama(variant={"dtype": dtype, "bias": True})
    save_pretrained(model, tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m")
    assert loaded.dtype == dtype and equal_models(model, loaded)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_dtype_arguments_leave_codes_and_scales_alone(tmp_path):
    model = packed_llama(variant={"bias": True}, weight_scale_dtype="float32")
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


def test_dtype_by_name(tmp_path):
    save_pretrained(tiny_llama(), tmp_path / "m")
    for name in ("float32", "float16", "bfloat16"):
        assert from_pretrained(tmp_path / "m", dtype=name).dtype == getattr(torch, name)
    for wrong in ("float64", "torch.float32", "", 32, []):
        with pytest.raises(ConfigError, match=r"^dtype: .* is not supported; use float32"):
            from_pretrained(tmp_path / "m", dtype=wrong)


def test_device_is_checked_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(ConfigError, match=r"^device: .* has no CUDA; use cpu$"):
            from_pretrained(tmp_path / "none", device=device)
    for device in ("gpu", "", [], 1.5):
        with pytest.raises(ConfigError, match=r"^device: .* is not a device; use cpu, cuda"):
            from_pretrained(tmp_path / "none", device=device)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_shards(tmp_path, kind):
    model = tiny_llama(2) if kind == "plain" else packed_llama(seed=2)
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


def test_generation_config_and_tokenizer(tmp_path):
    model = packed_llama()
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
    folder = save_pretrained(packed_llama(seed=1), tmp_path / "m")
    (folder / "notes.md").write_text("mine")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "state").write_text("x")
    model = packed_llama("8-8-8", seed=2)
    save_pretrained(model, folder)
    verify_export(model, folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "checkpoint-10" / "state").read_text() == "x"
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("step", ["save_file", "write_json", "sha256", "rename", "rename-back"])
def test_a_failure_loses_nothing(tmp_path, monkeypatch, step):
    old, new = packed_llama(seed=1), packed_llama("8-8-8", seed=2)
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


@pytest.mark.parametrize("moment", ["before 1", "after 1", "before 2", "after 2", "rmtree"])
def test_killed_while_replacing(tmp_path, moment):
    """Whenever the process dies, one checkpoint is complete, and the error says where."""
    old, new = packed_llama(seed=1), packed_llama("8-8-8", seed=2)
    folder = save_pretrained(old, tmp_path / "m")
    child = os.fork()
    if child == 0:
        real, calls = os.rename, []

        def rename(source, target):
            calls.append(1)
            if moment == f"before {len(calls)}":
                os._exit(9)
            real(source, target)
            if moment == f"after {len(calls)}":
                os._exit(9)

        os.rename = rename
        shutil.rmtree = lambda *args, **kwargs: os._exit(9)
        try:
            save_pretrained(new, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if moment in ("after 1", "before 2"):
        with pytest.raises(CheckpointError, match="a save was interrupted, rename") as excinfo:
            from_pretrained(folder)
        name = str(excinfo.value).split("rename ")[1].split(" to ")[0]
        os.rename(tmp_path / name, folder)
        verify_export(old, folder)
    else:
        verify_export(old if moment == "before 1" else new, folder)
    save_pretrained(new, folder)
    verify_export(new, folder)


def test_links_mounts_and_the_current_folder(tmp_path, monkeypatch):
    model = packed_llama()
    folder = save_pretrained(model, tmp_path / "real")
    (tmp_path / "link").symlink_to(folder)
    assert save_pretrained(model, tmp_path / "link") == folder
    assert (tmp_path / "link").is_symlink()
    verify_export(model, tmp_path / "link")
    monkeypatch.chdir(folder)
    for where in (".", tmp_path, "/"):
        with pytest.raises(ConfigError, match="current directory"):
            save_pretrained(model, where)
    save_pretrained(model, "inside")
    verify_export(model, "inside")


def test_interrupted_between_the_renames_is_explained(tmp_path):
    folder = save_pretrained(packed_llama(), tmp_path / "m")
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
    model = packed_llama()
    folder = save_pretrained(model, tmp_path / "m")
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight_codes[0, 0] ^= 1
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight_codes differs"):
        verify_export(other, folder)
    with pytest.raises(CheckpointError, match="settings"):
        verify_export(packed_llama("8-8-4"), folder)
