"""The layout on disk, packed by hand and by the compressed-tensors library."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import packed_llama, random_tokens, tiny_llama
from transformers import AutoModelForCausalLM

import llmqat_kernels as qk
from llmqat.checkpoint import save_pretrained
from llmqat.checkpoint.format import LinearShape, decode_linear, encode_linear
from llmqat.config import QATConfig
from llmqat.convert import convert
from llmqat.nn.quantized_linear import QuantizedLinear


def test_layout_w4(tmp_path):
    model = packed_llama("4-8-4", kv_mode="serving", variant={"intermediate": 101})
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
        save_pretrained(packed_llama("8-8-8"), tmp_path / "a") / "model.safetensors"
    )
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert "model.layers.0.mlp.up_proj.weight_packed" not in tensors
    folder = save_pretrained(packed_llama("4-16-16"), tmp_path / "b")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["input_activations"] is None


def test_scale_dtype_on_disk(tmp_path):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = packed_llama(weight_scale_dtype=name)
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


@pytest.mark.parametrize("setting", ["4-8-8", "4-16-16", "8-8-8", "8-16-8"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_compressed_tensors_reads_our_codes(tmp_path, setting, group_size):
    """transformers through the compressed-tensors library decompresses to exactly our weights."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = packed_llama(setting, kv_mode="serving", group_size=group_size)
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
