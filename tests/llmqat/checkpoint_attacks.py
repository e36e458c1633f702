"""The attacks of test_checkpoint_attacks.py: named ways to spoil a packed folder in place."""

import hashlib
import json
import os
import struct

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "llmqat_manifest.json"
INDEX = "model.safetensors.index.json"
CODES = "model.layers.0.mlp.up_proj.weight_packed"
DOWN = "model.layers.0.mlp.down_proj.weight_packed"
SCALE = "model.layers.0.mlp.up_proj.weight_scale"
SHAPE = "model.layers.0.mlp.up_proj.weight_shape"


def refresh(folder):
    """Make the manifest agree with the files again."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in sorted(os.listdir(folder))
        if name != MANIFEST and (folder / name).is_file()
    }
    path.write_text(json.dumps(manifest))


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(**change):
    """Change one field of the codes' header entry."""

    def apply(folder):
        header, data = header_of(folder / WEIGHTS)
        header[CODES].update(change)
        write_raw(folder / WEIGHTS, header, data)

    return apply


def head(function):
    """Replace the header object (or its bytes) by what `function(header)` gives."""

    def apply(folder):
        header, data = header_of(folder / WEIGHTS)
        write_raw(folder / WEIGHTS, function(header) or header, data)

    return apply


def raw(function):
    def apply(folder):
        (folder / WEIGHTS).write_bytes(function((folder / WEIGHTS).read_bytes()))

    return apply


def tensor(name, function):
    """Replace one tensor by `function(tensor)`, None to drop it; the file stays well formed."""

    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        value = function(tensors.get(name))
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value.contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def text(data, name=CONFIG):
    def apply(folder):
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return apply


def config(path, value):
    """Set (or with `...` delete) one key of config.json, by dotted path."""

    def apply(folder):
        values = json.loads((folder / CONFIG).read_text())
        target = values
        *parents, last = path.split(".")
        for part in parents:
            target = target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value
        (folder / CONFIG).write_text(json.dumps(values))

    return apply


def spoil(index, value):
    def change(t):
        t = t.clone()
        t.view(-1)[index] = value
        return t

    return change


def duplicate_key(header):
    body = json.dumps(header)
    return (body[:-1] + f', "{CODES}": {json.dumps(header[CODES])}}}').encode()


def renamed(name):
    def change(header):
        header[name] = header.pop(CODES)

    return change


FILE_ATTACKS = {
    "empty file": raw(lambda d: b""),
    "seven bytes": raw(lambda d: d[:7]),
    "header length only": raw(lambda d: d[:8]),
    "truncated header": raw(lambda d: d[:40]),
    "truncated data": raw(lambda d: d[:-1]),
    "data appended": raw(lambda d: d + b"\0"),
    "header length 0": raw(lambda d: struct.pack("<Q", 0) + d[8:]),
    "header length 1": raw(lambda d: struct.pack("<Q", 1) + d[8:]),
    "header length 2^63": raw(lambda d: struct.pack("<Q", 2**63) + d[8:]),
    "header length 2^64-1": raw(lambda d: struct.pack("<Q", 2**64 - 1) + d[8:]),
    "header too long by one": raw(
        lambda d: struct.pack("<Q", struct.unpack("<Q", d[:8])[0] + 1) + d[8:]
    ),
    "header over 8 MiB": head(lambda h: (json.dumps(h) + " " * (8 << 20)).encode()),
    "header not UTF-8": head(lambda h: b'{"\xff\xfe": 1}'),
    "header not JSON": head(lambda h: b"{not json"),
    "header is a list": head(lambda h: b"[1, 2]"),
    "header starts with a space": head(lambda h: b" " + json.dumps(h).encode()),
    "header of NaN": head(lambda h: b'{"a": NaN}'),
    "header nested deeply": head(lambda h: b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "header with huge integer": head(lambda h: b'{"a": ' + b"9" * 5000 + b"}"),
    "header with 1e999": head(lambda h: b'{"a": 1e999}'),
    "duplicate tensor": head(duplicate_key),
    "empty header": head(lambda h: b"{}"),
    "70,000 empty tensors": head(
        lambda h: {
            f"t{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(70_000)
        }
    ),
    "metadata not strings": head(lambda h: {**h, "__metadata__": {"format": 1}}),
    "metadata a list": head(lambda h: {**h, "__metadata__": []}),
    "metadata too large": head(lambda h: {**h, "__metadata__": {"x": "y" * 70_000}}),
    "metadata of another format": head(lambda h: {**h, "__metadata__": {"format": "np"}}),
    "entry a string": head(lambda h: {**h, CODES: "I32"}),
    "entry with extra field": entry(strides=[1, 1]),
    "entry without dtype": head(lambda h: h[CODES].pop("dtype") and None),
    "path as name": head(renamed("../../etc/passwd")),
    "empty name": head(renamed("")),
    "long name": head(renamed("a" * 300)),
    "name with newline": head(renamed("a\nb")),
    "unknown dtype": entry(dtype="I33"),
    "dtype a list": entry(dtype=["I32"]),
    "dtype bool": entry(dtype="BOOL"),
    "shape negative": entry(shape=[-20, 2]),
    "shape overflow": entry(shape=[2**31, 2**31]),
    "shape wraps to the size": entry(shape=[2**62, 4]),
    "shape of floats": entry(shape=[20.0, 2.0]),
    "shape of bools": entry(shape=[True, True]),
    "shape five dims": entry(shape=[1, 1, 1, 20, 2]),
    "shape a number": entry(shape=40),
    "transposed shape": entry(shape=[2, 20]),
    "offsets swapped": entry(data_offsets=[160, 0]),
    "offsets negative": entry(data_offsets=[-160, 0]),
    "offsets overlap": entry(data_offsets=[0, 160]),
    "offsets beyond the file": entry(data_offsets=[10**9, 10**9 + 160]),
    "offsets three": entry(data_offsets=[0, 80, 160]),
    "offsets of strings": entry(data_offsets=["0", "160"]),
    "offsets 2^64": entry(data_offsets=[2**64, 2**64 + 160]),
    "tensor missing": tensor(CODES, lambda t: None),
    "tensor unexpected": tensor("model.layers.9.extra", lambda t: torch.zeros(1)),
    "float instead of codes": tensor(CODES, lambda t: t.float()),
    "codes one row short": tensor(CODES, lambda t: t[:-1]),
    "code -8": tensor(CODES, spoil(0, 0x11111110)),
    "padding not zero": tensor(DOWN, spoil(2, 0x7FFFFFFF)),
    "scale NaN": tensor(SCALE, spoil(3, float("nan"))),
    "scale infinite": tensor(SCALE, spoil(3, float("inf"))),
    "scale zero": tensor(SCALE, spoil(3, 0.0)),
    "scale negative": tensor(SCALE, spoil(3, -1.0)),
    "scale fp16": tensor(SCALE, lambda t: t.half()),
    "scale without column": tensor(SCALE, lambda t: t[:, 0]),
    "weight_shape lies": tensor(SHAPE, lambda t: torch.tensor([20, 17])),
    "weight_shape negative": tensor(SHAPE, lambda t: torch.tensor([-20, 16])),
    "weight_shape int32": tensor(SHAPE, lambda t: t.int()),
}

CONFIG_ATTACKS = {
    "empty": text(""),
    "not JSON": text("{"),
    "a list": text("[]"),
    "a number": text("3"),
    "not UTF-8": text(b"\xff\xfe{}"),
    "byte order mark": text(b"\xef\xbb\xbf{}"),
    "over 1 MiB": text('{"a": "' + "x" * (1 << 20) + '"}'),
    "deep": text("[" * 100_000),
    "deep objects": text('{"a":' * 20 + "1" + "}" * 20),
    "duplicate key": text('{"model_type": "llama", "model_type": "llama"}'),
    "NaN": text('{"model_type": NaN}'),
    "auto_map": config("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
    "model_file": config("model_file", "evil.py"),
    "trust_remote_code": config("trust_remote_code", True),
    "model_type missing": config("model_type", ...),
    "model_type other": config("model_type", "gemma"),
    "model_type a list": config("model_type", ["llama"]),
    "architectures other": config("architectures", ["EvilForCausalLM"]),
    "hidden_size missing": config("hidden_size", ...),
    "hidden_size true": config("hidden_size", True),
    "hidden_size string": config("hidden_size", "16"),
    "hidden_size float": config("hidden_size", 16.0),
    "hidden_size zero": config("hidden_size", 0),
    "hidden_size negative": config("hidden_size", -16),
    "hidden_size huge": config("hidden_size", 2**40),
    "hidden_size other": config("hidden_size", 32),
    "layers huge": config("num_hidden_layers", 10**6),
    "layers two": config("num_hidden_layers", 2),
    "heads do not divide": config("num_attention_heads", 3),
    "kv heads do not divide": config("num_key_value_heads", 3),
    "kv heads zero": config("num_key_value_heads", 0),
    "head_dim odd": config("head_dim", 7),
    "head_dim huge": config("head_dim", 10**6),
    "vocab huge": config("vocab_size", 10**9),
    "positions huge": config("max_position_embeddings", 2**40),
    "eps zero": config("rms_norm_eps", 0),
    "eps string": config("rms_norm_eps", "1e-6"),
    "act unknown": config("hidden_act", "gelu"),
    "act a list": config("hidden_act", ["silu"]),
    "tied string": config("tie_word_embeddings", "yes"),
    "tied": config("tie_word_embeddings", True),
    "attention bias": config("attention_bias", True),
    "token id too large": config("eos_token_id", 32),
    "token ids nested": config("eos_token_id", [[1]]),
    "token ids none": config("eos_token_id", []),
    "rope a string": config("rope_parameters", "default"),
    "rope unknown type": config("rope_parameters", {"rope_type": "evil", "rope_theta": 1e4}),
    "rope type a list": config("rope_parameters", {"rope_type": ["default"]}),
    "rope theta zero": config("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    "rope unknown key": config("rope_parameters", {"rope_type": "default", "run": "x"}),
    "rope types differ": config("rope_parameters", {"rope_type": "default", "type": "linear"}),
    "rope incomplete": config("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    "dtype unknown": config("dtype", "int8"),
    "dtype a number": config("dtype", 32),
    "llmqat missing": config("llmqat", ...),
    "llmqat a list": config("llmqat", []),
    "llmqat unknown key": config("llmqat.code", "x"),
    "llmqat key missing": config("llmqat.kv_bits", ...),
    "llmqat spec unknown": config("llmqat.spec", "lq-99"),
    "llmqat stage unknown": config("llmqat.stage", "raw"),
    "llmqat stage prepared": config("llmqat.stage", "prepared"),
    "llmqat bits": config("llmqat.w_bits", 3),
    "llmqat bits bool": config("llmqat.w_bits", True),
    "llmqat bits off": config("llmqat.w_bits", 16),
    "llmqat kv bits": config("llmqat.kv_bits", 5),
    "llmqat group size": config("llmqat.group_size", 6),
    "llmqat group size huge": config("llmqat.group_size", 2**60),
    "llmqat mode": config("llmqat.kv_mode", "both"),
    "quantization_config missing": config("quantization_config", ...),
    "quantization_config other method": config("quantization_config.quant_method", "gptq"),
    "quantization_config other bits": config(
        "quantization_config.config_groups.group_0.weights.num_bits", 8
    ),
    "quantization_config bool for int": config(
        "quantization_config.config_groups.group_0.weights.symmetric", 1
    ),
    "quantization_config kv scheme": config("quantization_config.kv_cache_scheme", {"num_bits": 8}),
    "generation config list": text("[]", "generation_config.json"),
    "generation config unknown": text('{"custom_generate": "evil"}', "generation_config.json"),
    "generation config method": text('{"to_dict": "x"}', "generation_config.json"),
    "generation config nested": text('{"watermarking_config": {"a": 1}}', "generation_config.json"),
}
