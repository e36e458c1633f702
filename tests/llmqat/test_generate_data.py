"""Records are a function of (teacher, recipe, record id): slots, shards, order and restarts change
nothing.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

import llmqat_kernels as qk
from llmqat.cli import main
from llmqat.commands import generate_data
from llmqat.data import RecordWriter, open_dataset
from llmqat.data.generate import (
    Planner,
    Recipe,
    fill,
    generate_records,
    run_config,
    usable_first_tokens,
)
from llmqat.errors import ConfigError, DataError
from llmqat.runtime import Engine
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_tokenizer

VOCAB = 128
FIRST = list(range(3, VOCAB))


@pytest.fixture(autouse=True)
def no_mixed_backends():
    """`auto`, as a user runs it; bit equality is promised where every operator runs on the CPU
    backend.
    """
    with qk.use_backend("auto"):
        yield


def teacher(seed=0, **fields):
    return tiny_llama(seed, layers=1, heads=2, kv_heads=1, intermediate=48, **fields)


def records(recipe, ids, slots, model=None, stop_ids=()):
    engine = Engine(teacher() if model is None else model, max_slots=slots, max_len=recipe.max_len)
    steps = generate_records(engine, recipe, ids, FIRST, stop_ids=stop_ids)
    return {record.record_id: record for step in steps for record in step}


@pytest.mark.parametrize("strategy", ["hybrid", "greedy", "sampled"])
def test_slots_and_order_do_not_matter(strategy):
    recipe = Recipe(strategy, max_len=12, seed=5)
    ids = list(range(9))
    expected = records(recipe, ids, slots=1)
    assert sorted(expected) == ids
    for slots, order in ((4, ids), (9, ids[::-1]), (2, ids[4:] + ids[:4])):
        assert records(recipe, order, slots) == expected


def test_early_ends_refill_the_slots():
    recipe = Recipe("sampled", max_len=20, seed=1)
    ids = range(12)
    free = records(recipe, ids, slots=12)
    stop = [int(free[0].input_ids[4]), int(free[5].input_ids[7])]
    ended = records(recipe, ids, slots=3, stop_ids=stop)
    assert {r.finish_reason for r in ended.values()} == {"eos", "length"}
    for i, record in ended.items():
        whole = free[i].input_ids.tolist()
        cut = next((t + 1 for t, token in enumerate(whole) if t and token in stop), len(whole))
        assert record.input_ids.tolist() == whole[:cut]
        assert record.finish_reason == ("eos" if whole[cut - 1] in stop and cut > 1 else "length")


def test_a_record_follows_the_definition():
    """The prefix is the teacher's most likely token each time; then `sample` keyed by record and
    step.
    """
    model = teacher(3)
    recipe = Recipe("hybrid", max_len=10, seed=11, temperature=0.7, top_k=30)
    for i, record in records(recipe, range(6), slots=2, model=model).items():
        ids = record.input_ids.tolist()
        assert record.seed_token == ids[0] and 3 <= record.n_greedy <= 5
        engine = Engine(model, max_len=10)
        for step in range(1, 10):
            logits = engine.decode([ids[step - 1]], [0])
            if step <= record.n_greedy:
                assert ids[step] == int(logits.argmax())
            keys = torch.tensor([i]), torch.tensor([step])
            greedy = torch.tensor([step <= record.n_greedy])
            token = qk.sample(logits, *keys, seed=11, greedy=greedy, temperature=0.7, top_k=30)
            assert ids[step] == int(token)


def test_plans():
    recipe = Recipe(max_len=8, seed=2)
    plans = Planner(recipe, FIRST, "cpu").plan(range(600))
    assert {plan.n_greedy for plan in plans} == {3, 4, 5}
    starts = [plan.prompt[0] for plan in plans]
    assert min(starts) >= 3 and len(set(starts)) > 110
    assert plans[7] == Planner(recipe, FIRST, "cpu").plan([7])[0]
    assert plans != Planner(Recipe(max_len=8, seed=3), FIRST, "cpu").plan(range(600))
    enumerated = Planner(Recipe(first_token="enumerate"), FIRST, "cpu")
    requests = list(enumerated.requests(range(130)))
    assert [request.prompt[0] for request in requests] == [
        FIRST[i % len(FIRST)] for i in range(130)
    ]
    assert {
        request.n_greedy for request in Planner(Recipe("sampled"), FIRST, "cpu").plan([0, 1])
    } == {0}


def test_special_tokens_start_no_record(tmp_path):
    save_tokenizer(tmp_path, 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["added"])
    assert len(tokenizer) == 9 and usable_first_tokens(12, tokenizer) == [3, 4, 5, 6, 7]
    assert usable_first_tokens(4, None, [0]) == [1, 2, 3]
    with pytest.raises(DataError, match="first_token"):
        usable_first_tokens(1, None, [0])


def test_non_finite_logits_end_a_record_as_an_error(tmp_path):
    model = teacher(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[10] = float("inf")
    recipe = Recipe(first_token="enumerate", max_len=6)
    engine = Engine(model, max_slots=4, max_len=6)
    with RecordWriter(tmp_path, run_config(recipe, engine, FIRST, ()), records=12) as writer:
        summary = fill(writer, engine, recipe, FIRST, progress=False)
    assert summary.errors >= 1 and summary.records == 12
    failed = next(record for record in open_dataset(tmp_path) if record.record_id == 7)
    assert failed.finish_reason == "error" and failed.input_ids.tolist() == [10]


class Stop(Exception):
    pass


def test_restarts_and_shards_give_the_same_files(tmp_path):
    recipe = Recipe(max_len=8, seed=9)
    model = teacher(5)

    def run(folder, *, slots, shard="0/1", die_after=None):
        engine = Engine(model, max_slots=slots, max_len=8)
        config = run_config(recipe, engine, FIRST, ())
        with RecordWriter(folder, config, records=20, shard=shard, records_per_part=4) as writer:
            if die_after is not None:
                write, batches = writer.write, iter(range(die_after))

                def dying(batch):
                    if next(batches, None) is None:
                        raise Stop
                    write(batch)

                writer.write = dying
            return fill(writer, engine, recipe, FIRST, progress=False)

    run(tmp_path / "whole", slots=5)
    for die_after in (0, 1, 3):
        folder = tmp_path / f"killed{die_after}"
        with pytest.raises(Stop):
            run(folder, slots=3, die_after=die_after)
        assert run(folder, slots=7).records < 20 + (die_after == 0)
    for shard in ("1/3", "0/3", "2/3"):
        run(tmp_path / "sharded", slots=2, shard=shard)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "parts").iterdir()}
    assert len(expected) == 5
    for name in ("killed0", "killed1", "killed3", "sharded"):
        parts = (tmp_path / name / "parts").iterdir()
        assert {path.name: path.read_bytes() for path in parts} == expected
    assert len(open_dataset(tmp_path / "sharded")) == 20


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "best"},
        {"first_token": "zero"},
        {"max_len": 1},
        {"temperature": -1.0},
        {"top_k": -2},
        {"seed": -1},
        {"greedy_min": 6},
    ],
)
def test_bad_recipes(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Recipe(**fields)


def test_recipe_longer_than_the_engine():
    with pytest.raises(ConfigError, match="max_len"):
        next(generate_records(Engine(teacher(), max_len=8), Recipe(max_len=9), [0], FIRST))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "teacher"
    teacher(6, eos_token_id=2).save_pretrained(path)
    save_tokenizer(path)
    return path


def command(folder, output, *options):
    return main(["generate-data", "--model", str(folder), "--output", str(output), *options])


def test_command(folder, tmp_path, capsys):
    options = ("--num-records", "6", "--max-len", "8", "--slots", "4", "--seed", "3", "--json")
    assert command(folder, tmp_path / "data", *options) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["records"] == result["new_records"] == 6 and "tok/s" in err
    assert result["tokens"] == open_dataset(tmp_path / "data").tokens
    assert all(record.seed_token >= 3 for record in open_dataset(tmp_path / "data"))
    assert command(folder, tmp_path / "data", *options) == 0
    assert json.loads(capsys.readouterr().out)["kept_records"] == 6
    # Another teacher or another recipe must not be mixed in.
    assert command(folder, tmp_path / "data", *options, "--top-k", "50") == 1
    assert "top_k" in capsys.readouterr().err
    teacher(7, eos_token_id=2).save_pretrained(folder)
    assert command(folder, tmp_path / "data", *options) == 1
    assert "teacher_sha256" in capsys.readouterr().err


def test_command_adds_records_to_a_finished_folder(folder, tmp_path, capsys, caplog):
    options = ("--max-len", "8", "--slots", "4", "--seed", "3", "--json")
    for count in ("5", "9"):
        assert command(folder, tmp_path / "grown", "--num-records", count, *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["kept_records"], result["new_records"]) == (5, 4)
    assert "grows from 5 to 9 records" in caplog.messages
    assert command(folder, tmp_path / "whole", "--num-records", "9", *options) == 0
    grown, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "parts").iterdir()}
        for name in ("grown", "whole")
    )
    assert grown == whole


def test_command_by_tokens_and_approximate_cache(folder, tmp_path, capsys):
    options = ("--num-tokens", "30", "--max-len", "8", "--kv-bits", "8", "--threads", "1")
    assert command(folder, tmp_path / "data", *options) == 0
    out, err = capsys.readouterr()
    assert "approximate" in err and "4 records" in out
    assert open_dataset(tmp_path / "data").config["kv_bits"] == 8


@pytest.mark.parametrize(
    "options,word",
    [
        ((), "num_records"),
        (("--num-records", "2", "--num-tokens", "2"), "num_records"),
        (("--num-records", "0"), "num_records"),
        (("--num-records", "2", "--slots", "0"), "slots"),
        (("--num-records", "2", "--shard", "2/2"), "shard"),
        (("--num-records", "2", "--dtype", "int8"), "dtype"),
        (("--num-records", "2", "--device", "tpu"), "device"),
        (("--num-records", "2", "--strategy", "x"), "strategy"),
        (("--num-records", "2", "--max-len", "1000"), "--max-len: the model has"),
        (("--num-records", "2", "--max-len", "8", "--kv-bits", "3"), "kv_bits"),
        (("--num-records", "2", "--threads", "0"), "threads"),
    ],
)
def test_command_errors(folder, tmp_path, capsys, options, word):
    assert command(folder, tmp_path / "data", *options) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert word in err[-1] and err[-1].startswith("llmqat generate-data: ")


def test_refusals_come_before_the_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate_data, "load_model", lambda *_, **__: pytest.fail("it is loaded"))
    output = tmp_path / "file"
    output.touch()
    assert command(folder, output, "--num-records", "2") == 1
    assert f"--output: {output} is a file; name a folder" in capsys.readouterr().err
    assert command(folder, tmp_path / "data", "--num-records", "2", "--max-len", "1000") == 1
    assert "--max-len: the model has" in capsys.readouterr().err


def test_command_without_a_model(tmp_path, capsys):
    assert command(tmp_path / "none", tmp_path / "data", "--num-records", "1") == 1
    assert "not a folder" in capsys.readouterr().err
