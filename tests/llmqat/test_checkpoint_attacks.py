"""Hostile model folders: every malformed one ends in a CheckpointError or ConfigError of one line.

The attacker knows the format: unless a test is about the manifest, sizes and hashes are made right
again.
"""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.checkpoint.load import inspect
from llmqat.checkpoint.validate import parse_json, read_header
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "llmqat_manifest.json"
INDEX = "model.safetensors.index.json"
CODES = "model.layers.0.mlp.up_proj.weight_packed"
DOWN = "model.layers.0.mlp.down_proj.weight_packed"
SCALE = "model.layers.0.mlp.up_proj.weight_scale"
SHAPE = "model.layers.0.mlp.up_proj.weight_shape"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A packed folder in one file, one in shards, an int8 one, and a plain one."""
    root = tmp_path_factory.mktemp("originals")

    def small(**fields):
        return tiny_llama(
            0, heads=2, kv_heads=1, head_dim=8, intermediate=20, layers=1, vocab=32, **fields
        )

    w4 = convert(small(), QATConfig.parse("4-8-4"))
    save_pretrained(w4, root / "packed")
    save_pretrained(w4, root / "shards", max_shard_size=1500)
    save_pretrained(convert(small(), QATConfig.parse("6-8-4")), root / "int8")
    save_pretrained(small(), root / "plain")
    save_pretrained(prepare(small(), QATConfig.parse("4-8-4")), root / "prepared")
    return root


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


def expect_refusal(folder, pattern=None):
    started = time.monotonic()
    with pytest.raises((CheckpointError, ConfigError), match=pattern) as excinfo:
        from_pretrained(folder)
    text = str(excinfo.value)
    assert "\n" not in text and len(text) < 500, text
    assert time.monotonic() - started < 5


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
    "model_type other": config("model_type", "gpt2"),
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


@pytest.fixture
def packed(originals, tmp_path):
    return shutil.copytree(originals / "packed", tmp_path / "packed")


def test_the_untouched_folders_load(originals):
    for folder in originals.iterdir():
        from_pretrained(folder)


@pytest.mark.parametrize("attack", FILE_ATTACKS)
def test_weight_files(packed, attack):
    FILE_ATTACKS[attack](packed)
    expect_refusal(packed)  # the manifest notices
    refresh(packed)
    expect_refusal(packed)


@pytest.mark.parametrize("attack", CONFIG_ATTACKS)
def test_configs(packed, attack):
    CONFIG_ATTACKS[attack](packed)
    expect_refusal(packed)
    refresh(packed)
    expect_refusal(packed)


@pytest.mark.parametrize("value", [-128, -32, 32, 127])
def test_int8_codes_out_of_range(originals, tmp_path, value):
    folder = shutil.copytree(originals / "int8", tmp_path / "int8")
    tensor("model.layers.0.mlp.up_proj.weight", spoil(5, value))(folder)
    refresh(folder)
    expect_refusal(folder, r"outside \[-31, 31\]")


def test_manifest(packed):
    good = json.loads((packed / MANIFEST).read_text())

    def attempt(change, pattern):
        bad = json.loads(json.dumps(good))
        change(bad)
        (packed / MANIFEST).write_text(json.dumps(bad))
        expect_refusal(packed, pattern)

    attempt(lambda m: m.update(format="other"), "format")
    attempt(lambda m: m.update(version=2), "version")
    attempt(lambda m: m.update(version=True), "version")
    attempt(lambda m: m.update(spec="lq-0"), "spec")
    attempt(lambda m: m.update(extra=1), "expected")
    attempt(lambda m: m.update(files=[]), "files")
    attempt(lambda m: m["files"].pop(CONFIG), "files")
    attempt(lambda m: m["files"].pop(WEIGHTS), "not part|not in the manifest")
    attempt(lambda m: m["files"].update({"../x": m["files"][CONFIG]}), "malformed")
    attempt(lambda m: m["files"].update({"gone.json": m["files"][CONFIG]}), r"gone\.json: missing")
    attempt(lambda m: m["files"][WEIGHTS].update(size=1), "bytes")
    attempt(lambda m: m["files"][WEIGHTS].update(size=-1), "malformed")
    attempt(lambda m: m["files"][WEIGHTS].update(size=1.5), "malformed")
    attempt(lambda m: m["files"][WEIGHTS].update(sha256="0" * 64), "SHA-256")
    attempt(lambda m: m["files"][WEIGHTS].update(sha256=None), "malformed")
    attempt(lambda m: m["files"].update({WEIGHTS: "x"}), "malformed")
    (packed / MANIFEST).unlink()
    expect_refusal(packed, "missing")


def test_shards(originals, tmp_path):
    source = originals / "shards"
    names = sorted(p.name for p in source.glob("model-*.safetensors"))
    assert len(names) >= 3

    def attempt(number, change, pattern=None):
        folder = shutil.copytree(source, tmp_path / f"case{number}")
        change(folder)
        refresh(folder)
        expect_refusal(folder, pattern)

    def edit(function):
        def change(folder):
            index = json.loads((folder / INDEX).read_text())
            function(index["weight_map"])
            (folder / INDEX).write_text(json.dumps(index))

        return change

    attempt(0, lambda f: (f / names[1]).unlink(), "manifest")
    attempt(1, lambda f: (f / names[0]).write_bytes((f / names[1]).read_bytes()), "index")
    attempt(2, lambda f: shutil.copy(f / names[0], f / WEIGHTS), "both")
    attempt(3, edit(lambda m: m.update({CODES: "../evil.safetensors"})), "shard name")
    attempt(4, edit(lambda m: m.update({CODES: "/etc/passwd"})), "shard name")
    attempt(5, edit(lambda m: m.update({CODES: None})), "shard name")
    attempt(6, edit(lambda m: m.update({CODES: names[0], SCALE: names[1]})), "index|place")
    attempt(7, edit(lambda m: m.pop(CODES)), "index does not place")
    attempt(8, edit(lambda m: m.update(ghost=names[0])), "ghost")
    attempt(9, edit(lambda m: m.clear()), "weight_map")
    attempt(10, edit(lambda m: m.update({CODES: "model-00009-of-00009.safetensors"})), "numbered")
    attempt(11, text('{"weight_map": []}', INDEX), "weight_map")
    attempt(12, lambda f: (f / INDEX).unlink(), "no model")
    attempt(13, lambda f: shutil.copy(f / names[0], f / "model-00001-of-00001.safetensors"))


def test_links_fifos_and_folders(packed, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_bytes((packed / CONFIG).read_bytes())

    def attempt(name, make, pattern):
        keep = (packed / name).read_bytes()
        (packed / name).unlink()
        make(packed / name)
        expect_refusal(packed, pattern)
        (packed / name).rmdir() if (packed / name).is_dir() else (packed / name).unlink()
        (packed / name).write_bytes(keep)

    for name in (CONFIG, WEIGHTS, MANIFEST, "generation_config.json"):
        attempt(name, lambda p: p.symlink_to(outside), "leaves the folder")
        attempt(name, lambda p: os.mkfifo(p), "regular file")
        attempt(name, lambda p: p.mkdir(), "regular file")
        attempt(name, lambda p: p.symlink_to(p), "missing or unreadable")
        attempt(name, lambda p: p.symlink_to("/dev/zero"), "leaves the folder")
        attempt(name, lambda p: p.symlink_to(packed / "nowhere"), "missing")
    from_pretrained(packed)
    (packed / "real").write_bytes((packed / CONFIG).read_bytes())
    (packed / CONFIG).unlink()
    (packed / CONFIG).symlink_to("real")
    from_pretrained(packed)  # a link inside the folder is fine


def test_sparse_and_huge_files(packed):
    with open(packed / WEIGHTS, "r+b") as file:
        file.truncate(1 << 40)
    (packed / MANIFEST).unlink()
    config("llmqat", ...)(packed)
    config("quantization_config", ...)(packed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expect_refusal(packed, "data bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


class Payload:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


NAMES = [
    "pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt", "x.pkl", "X.PICKLE", "a.npy", "a.npz",
    "tf_model.h5", "flax_model.msgpack", WEIGHTS, CONFIG, MANIFEST, "generation_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_pickles_are_never_opened(packed, tmp_path, name):
    mark = tmp_path / "executed"
    (packed / name).write_bytes(pickle.dumps(Payload(mark)))
    expect_refusal(packed)
    if name != MANIFEST:
        refresh(packed)
        expect_refusal(packed)
    assert not mark.exists()


def test_a_folder_of_pickles_only(originals, tmp_path):
    folder = shutil.copytree(originals / "plain", tmp_path / "plain")
    (folder / MANIFEST).unlink()
    os.rename(folder / WEIGHTS, folder / "pytorch_model.bin")
    expect_refusal(folder, r"pytorch_model\.bin: .*convert it to safetensors")


def test_unlisted_weights(packed):
    shutil.copy(packed / WEIGHTS, packed / "other.safetensors")
    expect_refusal(packed, "not part of this checkpoint")


@pytest.mark.parametrize("where", [None, 3, "", "nowhere", "a\0b", b"bytes"])
def test_not_a_folder(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_refusal(where)


def test_prepared_section_is_checked(originals, tmp_path):
    folder = shutil.copytree(originals / "prepared", tmp_path / "prepared")
    config("llmqat.group_size", 6)(folder)
    refresh(folder)
    expect_refusal(folder, "group_size")


def test_random_headers(originals, tmp_path):
    """Thousands of mutated headers: refused, or exactly what the file says."""
    rng = random.Random(1)
    original = (originals / "packed" / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    tensors = read_header(originals / "packed", WEIGHTS)
    interesting = [
        b"-1",
        b"0",
        b"9" * 20,
        b"1e5",
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b"null",
        b"true",
        b"\0",
        b",",
    ]
    accepted = 0
    for _ in range(4000):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(0, 8 + length)
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at : at + rng.randint(1, 9)] = b""
            elif kind == 2:
                data[at:at] = rng.choice(interesting)
            else:
                data[at] ^= 1 << rng.randrange(8)
        (tmp_path / WEIGHTS).write_bytes(data)
        try:
            mutant = read_header(tmp_path, WEIGHTS)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        size = len(data) - 8 - struct.unpack("<Q", data[:8])[0]
        assert sum(info.end - info.begin for info in mutant.values()) == size
        assert len(mutant) == len(tensors)
    assert accepted < 2000


def test_random_configs(originals, tmp_path):
    """Mutated config.json: refused, or a config that still describes the files."""
    rng = random.Random(2)
    folder = shutil.copytree(originals / "plain", tmp_path / "plain")
    (folder / MANIFEST).unlink()
    values = json.loads((folder / CONFIG).read_text())
    wild = [
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**53,
        0.5,
        1e300,
        "",
        "x",
        "silu",
        [],
        [1],
        {},
        {"a": 1},
    ]
    loaded = 0
    for number in range(2000):
        mutant = dict(values)
        for _ in range(rng.randint(1, 2)):
            mutant[rng.choice(list(values))] = rng.choice(wild)
        data = bytearray(json.dumps(mutant).encode())
        if number % 4 == 0:
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / CONFIG).write_bytes(data)
        try:
            inspect(folder)
            if number % 10 == 0:
                from_pretrained(folder)
            loaded += 1
        except (CheckpointError, ConfigError) as error:
            assert "\n" not in str(error)
    assert 0 < loaded < 1500


def test_json_bounds():
    assert parse_json(b'{"a": [1, 2.5, "x", null, true]}', "x") == {"a": [1, 2.5, "x", None, True]}
    assert parse_json(b'{"a": -9007199254740992}', "x")["a"] == -(2**53)
    for bad in (b'{"a": 9007199254740993}', b'{"a": Infinity}', b'{"a": -NaN}', b'{"a": 1} x', b""):
        with pytest.raises(CheckpointError):
            parse_json(bad, "x")


def test_there_are_enough_attacks():
    assert len(FILE_ATTACKS) >= 60 and len(CONFIG_ATTACKS) >= 60
