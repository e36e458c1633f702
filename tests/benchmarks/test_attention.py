"""The sweep of decode attention: capacity of the cache, floors, codes, gates, the command."""

import csv

import pytest
import torch

from benchmarks import attention, cells
from benchmarks.attention import FORMS, GQA, MHA, TINY, Setup, Work, kv_capacity
from llmqat_kernels import KVCache, unpack_int4, use_backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setup():
    return Setup(Work(TINY[1], 37, 2), CPU)


def test_capacity_of_the_cache_as_allocated():
    """The bars of a 7B model, scales included."""
    assert kv_capacity(8) >= 1.998 and kv_capacity(4) >= 3.99
    assert kv_capacity(8) == pytest.approx(16384 / (8192 + 8), rel=1e-12)
    assert kv_capacity(4) == pytest.approx(16384 / (4096 + 8), rel=1e-12)
    assert kv_capacity(16) == 1.0
    assert kv_capacity(8, "serving") == pytest.approx(16384 / (8192 + 8 * 32))
    assert kv_capacity(4, heads=GQA) == pytest.approx(4096 / (1024 + 8))


@pytest.mark.parametrize(("bits", "mode"), [*FORMS, (16, "serving")])
def test_the_floor_is_the_cache_as_allocated(bits, mode):
    work = Work(GQA, 1024, 3)
    cache = KVCache.allocate(
        3, 8, 1024, 128, bits=bits, mode=mode, device="meta", dtype=torch.bfloat16
    )
    assert work.cost(bits, mode).bytes == cache.nbytes + 4 * 3 * 32 * 128
    assert work.cost(bits, mode).flops == 4 * 3 * 32 * 128 * 1024


def test_random_codes_are_those_of_a_quantizer():
    cache = attention.random_cache(Work(TINY[0], 64, 2), 4, "paper", CPU)
    codes = unpack_int4(cache.k_codes, 16)
    assert set(codes.unique().tolist()) == set(range(-7, 8))
    wide = attention.random_cache(Work(TINY[0], 64, 2), 8, "serving", CPU)
    assert wide.v_codes.min() >= -127 and wide.v_codes.unique().numel() > 200
    assert bool((wide.k_scale > 0).all()) and wide.k_scale.unique().numel() > 100


def test_the_plan_begins_where_the_bars_are():
    found = attention.plan(False, False)
    assert {work.heads for work in found[:2]} == {MHA, GQA} and found[0].tokens >= 8192
    assert len(found) == len(set(found)) == 2 * 8 * 7


def test_every_form_passes_its_gate(setup):
    found = attention.ours(setup, "cpu") | attention.baselines(setup)
    ready, notes = cells.prepare(found, CPU)
    assert {f"cpu KV{bits} {mode}" for bits, mode in FORMS} <= set(ready)
    assert "SDPA flash" in ready and all(note.startswith("left out") for note in notes.values())
    assert "CUDA device" in notes[attention.FLEX]


@pytest.mark.parametrize(("bits", "mode"), FORMS)
def test_pages_hold_the_same_tokens(bits, mode):
    """The reference's paged form over shuffled pages, against its contiguous one."""
    setup = Setup(Work(TINY[1], 128, 2), CPU)
    cache = setup.caches[bits, mode]
    with use_backend("reference"):
        expected, actual = setup.decode(cache), setup.paged(cache)()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", ["KV8 paper", "KV4 serving"])
def test_a_gate_catches_a_wrong_head(setup, form):
    candidate = attention.ours(setup, "cpu")[f"cpu {form}"]
    (call,) = candidate.make(1)
    with pytest.raises(AssertionError):
        candidate.gate(lambda: call().flip(1))


def test_a_baseline_on_other_keys_fails(setup):
    candidate = attention.baselines(setup)["SDPA flash"]
    (call,) = candidate.make(1)
    with pytest.raises(AssertionError, match="differs"):
        candidate.gate(lambda: call().flip(0))


def test_the_command_records_every_candidate(tiny_machine, tmp_path, capsys):
    argv = ["--quick", "--rounds", "1", "--save", "--results", str(tmp_path)]
    assert attention.main([*argv, "--skip", "reference", "math"]) == 0
    out = capsys.readouterr().out
    assert "2 cells, 0 failed gates" in out and "KV4 cache: 3.992x" in out
    with (tmp_path / "attention_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {cells.parse_cell(row["cell"])["heads"] for row in rows} == {"MHA", "GQA"}
    timed = [row for row in rows if row["candidate"] == "cpu KV8 paper"]
    assert all(row["gate"] == "passed" and float(row["ratio"]) > 0 for row in timed)
