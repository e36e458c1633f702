"""GGUF import against files that the tests write with the gguf package."""

import os
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmqat.errors import CheckpointError
from llmqat.models.gguf_import import convert_gguf, read_gguf, unpermute_rows

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install gguf")

CONTROL, NORMAL, USER = 3, 1, 4
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "ab", "Ġab", "12", "<tool>"]
TYPES = [CONTROL] * 3 + [NORMAL] * (len(TOKENS) - 4) + [USER]
MERGES = ["a b", "Ġ ab", "1 2"]

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _permute(weight, heads):
    """The order in which GGUF stores q and k: row 2i of a head is i, row 2i + 1 is i + D/2."""
    head_dim = weight.shape[0] // heads
    order = [
        h * head_dim + i + half
        for h in range(heads)
        for i in range(head_dim // 2)
        for half in (0, head_dim // 2)
    ]
    return weight[order]


def _tiny(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=20000.0,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def _write(path, model, *, types=None, skip=(), extra=(), **metadata):
    """Writes `model` as GGUF. `types`: tensor name pattern to quantization type."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), metadata.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "scaling" in metadata:
        writer.add_rope_scaling_type(metadata["scaling"])
    writer.add_tokenizer_model(metadata.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types(metadata.get("token_types", TYPES))
    writer.add_token_merges(metadata.get("merges", MERGES))
    writer.add_bos_token_id(metadata.get("bos", 1))
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(metadata.get("add_bos", False))
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        names["output"] = "lm_head"
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{k}": f"model.layers.{i}.{v}" for k, v in LAYER.items()}
    for name, source in names.items():
        if name in skip:
            continue
        weight = state[f"{source}.weight"]
        if name.endswith("attn_q"):
            weight = _permute(weight, config.num_attention_heads)
        elif name.endswith("attn_k"):
            weight = _permute(weight, config.num_key_value_heads)
        data = weight.numpy().astype(np.float32)
        kind = next((t for p, t in (types or {}).items() if re.search(p, name)), None)
        if kind is None:
            writer.add_tensor(f"{name}.weight", data)
        else:
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unpermute_inverts_the_writers_order():
    weight = torch.arange(24 * 3).reshape(24, 3).float()
    assert torch.equal(unpermute_rows(_permute(weight, 3), 3), weight)
    # Written by hand: one head of 4 rows is stored 0, 2, 1, 3.
    rows = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    assert unpermute_rows(rows, 1).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tied", [True, False])
def test_folder_holds_the_same_model(tmp_path, tied):
    model = _tiny(tied)
    folder = convert_gguf(_write(tmp_path / "m.gguf", model), tmp_path / "out" / "folder")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["folder"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert loaded.config.tie_word_embeddings is tied
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.rope_parameters["rope_theta"] == 20000.0
    assert loaded.generation_config.eos_token_id == 2
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_quantized_blocks_become_the_exact_fp32_values(tmp_path):
    model, kinds = _tiny(), gguf.GGMLQuantizationType
    types = {
        "token_embd": kinds.Q8_0,
        r"attn_[qk]": kinds.Q4_1,
        "ffn": kinds.Q4_0,
        "attn_v": kinds.F16,
    }
    types = {r"ffn_(gate|up|down)" if p == "ffn" else p: t for p, t in types.items()}
    path = _write(tmp_path / "m.gguf", model, types=types)
    _, state = read_gguf(path)
    original = model.state_dict()

    def blocks(values, kind):
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))

    for name, kind in [
        ("model.embed_tokens", kinds.Q8_0),
        ("model.layers.1.mlp.up_proj", kinds.Q4_0),
    ]:
        expected = blocks(original[f"{name}.weight"].numpy(), kind)
        assert torch.equal(state[f"{name}.weight"], expected)
    k = original["model.layers.0.self_attn.k_proj.weight"]
    # Blocks lie along a row, so the row order and the blocks commute.
    assert torch.equal(
        state["model.layers.0.self_attn.k_proj.weight"], blocks(k.numpy(), kinds.Q4_1)
    )
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in state.values())


def test_tokenizer(tmp_path):
    folder = convert_gguf(_write(tmp_path / "m.gguf", _tiny()), tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "ab  ab12 ü\n\n<tool></s>x"
    ids = tokenizer(text)["input_ids"]
    # Digits stand alone although a merge "1 2" exists; no BOS; special and added tokens whole.
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "ab", "Ġ", "Ġab", "1", "2", "Ġ", "Ã", "¼", "Ċ", "Ċ", "<tool>", "</s>", "x",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("</s>", "")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert len(tokenizer) == len(TOKENS)


def test_gpt2_split_keeps_numbers_and_bos_is_added_when_the_file_says_so(tmp_path):
    path = _write(tmp_path / "m.gguf", _tiny(), pre="gpt-2", add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "folder"))
    ids = tokenizer("12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "12"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"scaling": gguf.RopeScalingType.YARN}, "RoPE scaling 'yarn'"),
        ({"tokenizer": "llama"}, "tokenizer 'llama'"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2'"),
        ({"merges": ["a zz"]}, "merge 'a zz'"),
        ({"merges": ["a"]}, "merge 'a'"),
        ({"token_types": TYPES[1:]}, "do not match their types"),
        ({"bos": 10_000}, "bos token 10000"),
        ({"skip": ("blk.1.ffn_up",)}, "lacks 1 tensors.*layers.1.mlp.up_proj"),
        ({"extra": [("rope_freqs.weight", np.ones(8, np.float32))]}, "'rope_freqs.weight'"),
        ({"extra": [("blk.2.ffn_up.weight", np.ones((96, 64), np.float32))]}, "blk.2.ffn_up"),
        ({"extra": [("blk.0.attn_q.bias", np.ones(64, np.float32))]}, "attn_q.bias"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, change, text):
    path = _write(tmp_path / "m.gguf", _tiny(), **change)
    with pytest.raises(CheckpointError, match=text) as caught:
        convert_gguf(path, tmp_path / "folder")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match="no GGUF file"):
        read_gguf(tmp_path / "none.gguf")
    whole = _write(tmp_path / "m.gguf", _tiny()).read_bytes()
    for size in (0, 3, 20, 300, len(whole) // 2, len(whole) - 4):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            read_gguf(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("not a model " * 100)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        read_gguf(tmp_path / "text.gguf")


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    path = _write(tmp_path / "m.gguf", _tiny())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmqat.models.gguf_import.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert_gguf(path, tmp_path / "folder")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_an_existing_folder_is_left_as_it_is(tmp_path):
    path = _write(tmp_path / "m.gguf", _tiny())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="folder"):
        convert_gguf(path, tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["folder", "m.gguf"]
