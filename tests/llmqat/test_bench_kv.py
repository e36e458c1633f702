"""`llmqat bench kv`: the paper's KV memory, and the engine's, with speed where there is room."""

import json

import pytest
import torch

import llmqat
from llmqat import cli
from llmqat.bench import kv, kv_report
from llmqat.bench.subjects import fill
from llmqat.commands.bench import KVArguments, bench_kv
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.eval.cost import ModelShape
from llmqat.models.shapes import find_shape
from llmqat.runtime.engine import Engine
from llmqat_kernels import KVCache
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.tiny import packed_llama, tiny_llama
from tests.llmqat.tiny_families import tiny_model

# paper.md 1.10: GiB at 1k, 2k, 16k and 32k tokens for 16 bits, at 32k for 8, at 1k and 32k for 4.
PAPER = {
    "llama-7b": ((0.50, 1.00, 8.0, 16.0), 8.0, (0.125, 4.0)),
    "llama-13b": ((0.78, 1.56, 12.5, 25.0), 12.5, (0.195, 6.25)),
    "llama-30b": ((1.52, 3.05, 24.4, 48.8), 24.4, (0.381, 12.2)),
    "llama-65b": ((2.5, 5.0, 40, 80), 40, (0.625, 20)),
    "llama-2-70b": ((0.31, 0.63, 5.0, 10.0), 5.0, (0.078, 2.5)),
    "llama-3-8b": ((0.125, 0.25, 2.0, 4.0), 2.0, (0.031, 1.0)),
}


@pytest.mark.parametrize("name", PAPER)
def test_kv_memory_of_the_paper(name):
    result = bench_kv(KVArguments(name, seq_lens="1k,2k,16k,32k"))
    gib = {(row["bits"], row["seq_len"]): row["computed_gib"] for row in result["rows"]}
    assert len(gib) == 12
    sixteen, eight, four = PAPER[name]
    expected = {(16, n * 1024): value for n, value in zip((1, 2, 16, 32), sixteen, strict=True)}
    expected |= {(8, 32768): eight, (4, 1024): four[0], (4, 32768): four[1]}
    for key, value in expected.items():
        # The table has no scales (at most 0.8 % at 4 bits in this mode) and two or three digits.
        assert gib[key] == pytest.approx(value, rel=0.02)
    assert all("without weights" in row["note"] for row in result["rows"])


def test_shapes_of_the_paper():
    elements = {name: 2 * s.layers * s.kv_heads * s.head_dim for name, s in _shapes()}
    assert elements == {
        "llama-7b": 262_144,
        "llama-13b": 409_600,
        "llama-30b": 798_720,
        "llama-65b": 1_310_720,
        "llama-2-70b": 163_840,
        "llama-3-8b": 65_536,
    }


def _shapes():
    return ((name, ModelShape.from_config(find_shape(name).config())) for name in PAPER)


@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_measured_memory_is_the_computed(mode, backend):
    model = tiny_llama(dtype=torch.bfloat16)
    rows, engine = kv.measure(model, [16, 64, 1024], [16, 8, 4], kv_mode=mode, batch=3, steps=2)
    assert [(row.bits, row.seq_len) for row in rows[:3]] == [(16, 16), (16, 64), (16, 1024)]
    assert engine["weight_bytes"]["linears"] > 0
    for row in rows:
        if row.seq_len == 1024:
            assert row.note == "computed only: the model has 512 positions"
            assert row.measured_bytes is None
        else:
            assert row.measured_bytes == row.computed_bytes
            low, median, high = row.milliseconds
            assert 0 < low <= median <= high
            assert row.tokens_per_second == pytest.approx(3000 / median)


def test_the_window_is_named_where_it_is_the_limit():
    model = tiny_model("mistral", dtype=torch.bfloat16, sliding_window=16)
    rows, _ = kv.measure(model, [16, 32, 512], [16], kv_mode="serving", steps=2)
    assert rows[0].measured_bytes == rows[0].computed_bytes
    window = "the engine has no windows, and the model's sliding window is 16 tokens"
    assert [row.note for row in rows] == ["", *[f"computed only: {window}"] * 2]
    wide = tiny_model("mistral", dtype=torch.bfloat16, sliding_window=4096)
    rows, _ = kv.measure(wide, [512], [16], kv_mode="serving", steps=2)
    assert rows[0].note == "computed only: the model has 256 positions"


@pytest.mark.parametrize("setting", ["16-16-16", "8-8-4"])
def test_a_family_without_engine_is_measured_with_floats(setting, tmp_path, capsys):
    model = tiny_model("gpt2")
    if setting != "16-16-16":
        model = llmqat.prepare(model, QATConfig.parse(setting))
    llmqat.save_pretrained(model, tmp_path / "model")
    argv = ["bench", "kv", "--model", str(tmp_path / "model"), "--seq-lens", "1,16,1k"]
    assert cli.main([*argv, "--batch", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backends"] == {"forward": "transformers"} and result["setting"] == setting
    rows = {(row["bits"], row["seq_len"]): row for row in result["rows"]}
    for length in (1, 16):
        row = rows[16, length]
        assert row["measured_bytes"] == row["computed_bytes"] == length * 3 * 2 * 2 * 64 * 2
        assert row["tokens_per_second"] > 0 and row["note"] == ""
        # codes, and a scale of 4 bytes, of K and V in 2 layers
        assert rows[8, length]["computed_bytes"] == length * 3 * 2 * 2 * (64 + 4)
    engine = "computed only: codes are held by the engine, which does not run GPT2LMHeadModel"
    positions = "computed only: the model has 256 positions"
    assert {row["note"] for key, row in rows.items() if row["measured_bytes"] is None} == {
        engine, positions,
    }  # fmt: skip
    assert rows[16, 1024]["note"] == positions


def test_a_packed_model_runs_in_every_width():
    rows, _ = kv.measure(
        packed_llama("4-8-4", kv_mode="serving").to(torch.bfloat16),
        [32], [16, 8, 4], kv_mode="serving", steps=2,
    )  # fmt: skip
    assert [row.measured_bytes for row in rows] == [row.computed_bytes for row in rows]


def test_without_memory_a_length_is_computed_only(monkeypatch):
    monkeypatch.setattr(kv, "free_memory", lambda device: 10_000)
    model = tiny_llama(dtype=torch.bfloat16)
    rows, _ = kv.measure(model, [16, 64], [16], kv_mode="paper", steps=2)
    assert rows[0].measured_bytes == 16 * 256
    assert rows[1].measured_bytes is None
    assert rows[1].note.startswith("computed only: 0.0 GiB of")
    assert rows[1].computed_bytes == 64 * 256


def test_free_memory_is_plausible():
    assert 1 << 20 < kv.free_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fill_writes_every_code_but_the_one_that_never_occurs(bits):
    caches = [KVCache.allocate(2, 2, 64, 16, bits=bits, mode="paper") for _ in range(2)]
    fill(caches)
    for name in ("k_codes", "k_scale", "v_codes", "v_scale"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name))
    assert not torch.equal(caches[0].k_codes, caches[0].v_codes)
    if bits == 16:
        return
    codes = caches[0].k_codes
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4]).to(torch.int8)
        codes = codes - 16 * (codes > 7)
    limit = 2 ** (bits - 1) - 1
    assert (codes.min(), codes.max()) == (-limit, limit)
    assert torch.all(caches[0].k_scale * limit == 1)


def test_the_engine_takes_another_cache():
    engine = Engine(tiny_llama(), max_slots=2, max_len=64)
    prompt = [5, 9, 2, 17]
    before, held = engine.prefill([0], [prompt]), engine.cache_bytes
    engine.replace_cache(max_len=16, kv_bits=4, kv_mode="serving")
    assert (engine.length(0), engine.max_len, engine.kv_bits) == (0, 16, 4)
    assert engine.cache_bytes < held / 16
    engine.replace_cache(max_len=64, kv_bits=16)
    assert engine.cache_bytes == held
    assert torch.equal(engine.prefill([0], [prompt]), before)
    engine.assume_length(1, 64)
    assert engine.length(1) == 64
    for refused in (
        lambda: engine.replace_cache(max_len=65),
        lambda: engine.replace_cache(max_len=0),
        lambda: engine.assume_length(1, 65),
        lambda: engine.assume_length(2, 1),
    ):
        with pytest.raises(InvalidArgument):
            refused()
    with pytest.raises(ConfigError, match="kv_bits"):
        engine.replace_cache(max_len=8, kv_bits=3)


def test_the_command_writes_table_json_and_plot(tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "out"
    llmqat.save_pretrained(tiny_llama(), model)
    argv = ["bench", "kv", "--model", str(model), "--seq-lens", "16,64,1k", "--steps", "2"]
    assert cli.main([*argv, "--bits", "16,4", "--output", str(output), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((output / "kv.json").read_text())
    assert (printed["kv_mode"], printed["setting"]) == ("paper", "16-16-16")
    assert len(printed["rows"]) == 6
    table = (output / "kv.md").read_text()
    assert table == kv_report.table(printed)
    assert "| 1k |" in table
    assert "the model has 512 positions" in table
    assert (output / "kv.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*argv, "--bits", "8"]) == 0
    assert "KV8 GiB computed" in capsys.readouterr().out


def test_a_prepared_model_brings_its_mode(tmp_path):
    config = QATConfig.parse("4-8-4", kv_mode="serving")
    llmqat.save_pretrained(llmqat.prepare(tiny_llama(), config), tmp_path / "model")
    result = bench_kv(KVArguments(str(tmp_path / "model"), seq_lens="16", steps=2))
    assert (result["kv_mode"], result["setting"]) == ("serving", "4-8-4")


def test_lengths():
    assert kv.parse_lengths("1k, 2K,512") == [1024, 2048, 512]
    for text in ("", "0", "1m", "-5", "1.5k", "1k,,2k"):
        with pytest.raises(ConfigError, match="--seq-lens"):
            kv.parse_lengths(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "neither a folder nor a known shape"),
        ({"bits": "16,2"}, "--bits: '2' is not supported"),
        ({"kv_mode": "other"}, "--kv-mode"),
        ({"batch": 0}, "--batch"),
        ({"steps": 1}, "--steps"),
        ({"dtype": "float32"}, "--dtype"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        bench_kv(KVArguments(**{"model": "llama-7b", **options}))
