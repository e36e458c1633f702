"""Tables of tiles: what is measured is taken, the rest falls back, and nothing tunes on a call."""

import json
from dataclasses import asdict, dataclass

import pytest
import torch

from benchmarks import tune
from benchmarks.entry import Job, same_bits
from llmqat_kernels.backends.triton import launch, tiles
from llmqat_kernels.errors import BackendUnavailable, InvalidArgument


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    num_warps: int


DEFAULT, OTHER = Tile(128, 128, 8), Tile(64, 128, 4)


@pytest.fixture
def table(monkeypatch):
    """Tables with these tiles in place of the repository's."""

    def use(**entries):
        content = {"arch": 90, "source": "measured", "tiles": entries}
        monkeypatch.setattr(tiles, "table", lambda arch: content)

    return use


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"M": 1}, "M<=1"),
        ({"M": 0}, "M<=1"),
        ({"M": 128, "N": 129}, "M<=128 N<=256"),
        ({"K": 28672}, "K<=32768"),
        ({"N": 128256, "w": "packed"}, "N>32768 w=packed"),
    ],
)
def test_buckets(sizes, key):
    assert tiles.bucket(**sizes) == key


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90), ((12, 1), 90)],
)
def test_a_newer_device_takes_the_newest_older_table(capability, arch):
    assert tiles.table_of(capability) == arch


def test_a_device_that_is_too_old_is_refused():
    with pytest.raises(BackendUnavailable, match="sm_75 is too old, sm_80"):
        tiles.table_of((7, 5))


def test_cpu_tensors_take_the_newest_table():
    assert tiles.architecture(torch.device("cpu")) == 90


def test_what_is_not_measured_takes_the_default(table):
    table(matmul={"M<=2": {"tile": asdict(OTHER)}})
    assert tiles.tile_for("matmul", "M<=1", 90, DEFAULT) is DEFAULT
    assert tiles.tile_for("norm", "M<=2", 90, DEFAULT) is DEFAULT


def test_what_is_measured_is_taken(table):
    table(matmul={"M<=2": {"tile": asdict(OTHER)}})
    assert tiles.tile_for("matmul", "M<=2", 90, DEFAULT) == OTHER


def test_a_tile_with_other_fields_is_an_error(table):
    table(matmul={"M<=2": {"tile": {"m": 1, "warps": 2}}})
    with pytest.raises(InvalidArgument, match="matmul M<=2 has the fields m, warps, not m, n"):
        tiles.tile_for("matmul", "M<=2", 90, DEFAULT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"arch": 90, "source": "measured"}',
        '{"arch": 70, "source": "measured", "tiles": {}}',
        '{"arch": 90, "source": "measured", "tiles": {"a": {"b": {"tile": {"m": 1.5}}}}}',
    ],
)
def test_a_broken_table_is_an_error_that_names_the_file(text):
    with pytest.raises(InvalidArgument, match=r"sm_90\.json is no table of tiles"):
        tiles.parse(text, "sm_90.json")


def test_forced_and_asked():
    with tiles.asked() as asked, tiles.forced("matmul", OTHER):
        assert tiles.tile_for("matmul", "M<=2", 90, DEFAULT) == OTHER
        assert tiles.tile_for("norm", "M<=2", 90, DEFAULT) == DEFAULT
    assert asked == [
        tiles.Asked("matmul", "M<=2", 90, DEFAULT),
        tiles.Asked("norm", "M<=2", 90, DEFAULT),
    ]
    assert tiles.tile_for("matmul", "M<=2", 90, DEFAULT) == DEFAULT


@pytest.mark.parametrize("arch", tiles.ARCHS)
def test_tables_of_the_repository(arch):
    """Every table is readable; every measured tile is a candidate whose gates are checked."""
    found = tiles.table(arch)
    assert found["arch"] == arch
    assert (found["source"] == tiles.NOT_MEASURED) == (not found["tiles"])
    choices = tune.candidates(arch)
    for op, buckets in found["tiles"].items():
        allowed = [asdict(tile) for tile in choices[op]]
        assert all(entry["tile"] in allowed for entry in buckets.values()), op


@pytest.mark.parametrize("arch", tiles.ARCHS)
def test_operators_with_candidates_have_a_choice(arch):
    choices = tune.candidates(arch)
    assert "quantized_matmul" in choices
    assert all(len(tiles_of) > 1 for tiles_of in choices.values())


def variant(**constants):
    return launch.Variant("v", None, {}, constants, num_warps=4)


def test_a_candidate_must_be_one_of_the_compiled_variants():
    assert tune.compiled_as([variant(M=128, N=64, PACKED=True)], OTHER)
    assert not tune.compiled_as([variant(M=64, N=64)], OTHER)
    assert not tune.compiled_as([variant(M=128, N=64)], Tile(64, 128, 8))
    assert not tune.compiled_as([variant(M=64, N=128)], Tile(128, 128, 4))


def job(wrong=None):
    """An operator of one tensor; a launch with the tile ``wrong`` gives other bits."""

    def call():
        tile = tiles.tile_for("matmul", "M<=4", 90, DEFAULT)
        return torch.full((4,), 2.0 if tile == wrong else 1.0)

    return Job(call, {}, same_bits(lambda: torch.ones(4)), None)


def clock(seconds):
    """What `cuda.times` stands for: how long the tile takes that a call asks for last."""

    def once(call):
        seen = []

        def spy(*question):
            seen.append(original(*question))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            original = tiles.tile_for
            patch.setattr(tiles, "tile_for", spy)
            call()
        return seconds[seen[-1]]

    def times(candidates, rounds):
        found = {}
        for name, calls in candidates.items():
            each = [once(call) for call in calls]
            found[name] = [sum(each) / len(each)] * rounds
        return found, dict.fromkeys(candidates, "graph")

    return times


def measured(seconds, wrong=None):
    buckets = {}
    choices = {"matmul": (DEFAULT, OTHER, Tile(32, 128, 4))}
    timed = tune.measure(job(wrong), choices, buckets, clock(seconds), rounds=2)
    assert timed == [("matmul", "M<=4", "graph")]
    return buckets


SECONDS = {DEFAULT: 1.0, OTHER: 0.5, Tile(32, 128, 4): 0.75}


def test_the_fastest_candidate_is_written():
    buckets = measured(SECONDS)
    before = {
        "arch": 90,
        "tiles": {"matmul": {"M<=4": {"tile": {}}, "M<=1": {"tile": {}}}, "norm": {"a": {}}},
    }
    after = tune.merged(before, buckets, {"device": "X"})
    entry = after["tiles"]["matmul"]["M<=4"]
    assert entry["tile"] == asdict(OTHER) and entry["default"] == asdict(DEFAULT)
    assert entry["ratio"] == 0.5 and entry["default_us"] == 1e6
    assert after["tiles"]["matmul"].keys() == {"M<=1", "M<=4"} and "norm" in after["tiles"]
    assert after["source"] == "measured" and after["device"] == "X"
    assert tiles.parse(json.dumps(tune.merged({"arch": 90, "tiles": {}}, buckets, {})), "x")


def test_a_candidate_with_other_bits_is_refused():
    buckets = measured(SECONDS, wrong=OTHER)
    (bucket,) = buckets.values()
    assert bucket.refused[OTHER].startswith("other bits")
    assert bucket.best()["tile"] == asdict(Tile(32, 128, 4))


def test_a_gain_below_two_percent_leaves_the_default():
    buckets = measured({DEFAULT: 1.0, OTHER: 0.99, Tile(32, 128, 4): 1.5})
    (bucket,) = buckets.values()
    assert bucket.best() is None
    before = {"arch": 90, "tiles": {"matmul": {"M<=4": {"tile": {}}}}}
    assert tune.merged(before, buckets, {})["tiles"] == {}


def test_a_candidate_must_be_faster_over_all_cases_of_the_bucket():
    buckets = {}
    choices = {"matmul": (OTHER,)}
    for seconds in ({DEFAULT: 1.0, OTHER: 0.5}, {DEFAULT: 1.0, OTHER: 2.5}):
        tune.measure(job(), choices, buckets, clock(seconds), rounds=1)
    (bucket,) = buckets.values()
    assert len(bucket.default_us) == 2 and bucket.best() is None


def test_every_copy_of_the_inputs_takes_the_tile():
    """The copies are made once, and only where something is timed."""
    made, taken = [], []

    def others():
        made.append(True)
        return [job().call] * 2

    def times(candidates, rounds):
        for name, calls in candidates.items():
            with tiles.asked():
                taken.append((name, [float(call()[0]) for call in calls]))
        return {name: [1.0] for name in candidates}, {name: "graph" for name in candidates}

    choices = {"matmul": (DEFAULT, OTHER)}
    tune.measure(job(), choices, {}, times, 1, others)
    assert taken == [(tune.DEFAULT, [1.0] * 3), ("1", [1.0] * 3)] and made == [True]
    assert tune.measure(job(), {"norm": (DEFAULT,)}, {}, times, 1, others) == []
    assert made == [True]


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "no CUDA device" in said.err
