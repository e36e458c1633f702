"""Hostile model folders: every malformed one ends in a CheckpointError or ConfigError of one line.

The attacker knows the format: unless a test is about the manifest, sizes and hashes are made right
again.
"""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import time

import pytest
from checkpoint_attacks import (
    CODES,
    CONFIG,
    CONFIG_ATTACKS,
    FILE_ATTACKS,
    INDEX,
    MANIFEST,
    SCALE,
    WEIGHTS,
    config,
    refresh,
    spoil,
    tensor,
    text,
)
from tiny import tiny_llama

from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.checkpoint.inspection import inspect
from llmqat.checkpoint.validate import parse_json, read_header
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import CheckpointError, ConfigError


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


def expect_refusal(folder, pattern=None):
    started = time.monotonic()
    with pytest.raises((CheckpointError, ConfigError), match=pattern) as excinfo:
        from_pretrained(folder)
    text = str(excinfo.value)
    assert "\n" not in text and len(text) < 500, text
    assert time.monotonic() - started < 5


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
