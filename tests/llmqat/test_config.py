"""QATConfig: parsing, validation, round trips, one-line errors that name the field."""

import dataclasses

import pytest

from llmqat.config import QATConfig, QuantSpec
from llmqat.errors import ConfigError

PAPER = (
    "16-16-16",
    "8-8-4",
    "8-8-8",
    "8-8-16",
    "4-8-4",
    "4-8-8",
    "4-8-16",
    "4-6-16",
    "4-16-16",
    "8-16-16",
)
"""The settings of LLM-QAT tables 1 and 2."""


def message(excinfo):
    text = str(excinfo.value)
    assert "\n" not in text and len(text) < 200
    return text


def test_parse_and_setting():
    config = QATConfig.parse("4-8-16", kv_mode="serving", group_size=32)
    assert (config.w_bits, config.a_bits, config.kv_bits) == (4, 8, 16)
    assert (config.kv_mode, config.group_size, config.setting) == ("serving", 32, "4-8-16")
    assert QATConfig.parse("4-8-4").kv_mode == "paper"
    assert QATConfig.parse("4-8-4").weight_scale_dtype == "bfloat16"


@pytest.mark.parametrize("setting", PAPER)
def test_round_trip(setting):
    config = QATConfig.parse(setting, ste_clip=2.0)
    assert QATConfig.from_dict(config.to_dict()) == config
    assert config.setting == setting


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QATConfig.parse("4-8-4").w_bits = 8


@pytest.mark.parametrize(
    "setting",
    ["", "4-8", "4-8-4-4", "4_8_4", "a-b-c", "4-8-", "-4-8-4", "4-8-444", "٤-8-4", None, 484],
)
def test_bad_setting(setting):
    with pytest.raises(ConfigError) as excinfo:
        QATConfig.parse(setting)
    assert "bits" in message(excinfo)


@pytest.mark.parametrize("field", ["w_bits", "a_bits", "kv_bits"])
@pytest.mark.parametrize("value", [0, 1, 9, 15, 17, 64, -4, True, 4.0, "4", None])
def test_bad_bits(field, value):
    with pytest.raises(ConfigError) as excinfo:
        QATConfig(**{"w_bits": 4, "a_bits": 8, "kv_bits": 4, field: value})
    assert message(excinfo).startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_mode", "both"),
        ("kv_mode", None),
        ("kv_mode", ["paper"]),
        ("group_size", 0),
        ("group_size", 1),
        ("group_size", -2),
        ("group_size", 2**21),
        ("group_size", True),
        ("group_size", 32.0),
        ("weight_scale_dtype", "float16"),
        ("weight_scale_dtype", None),
        ("ste_clip", 0),
        ("ste_clip", -2.0),
        ("ste_clip", float("nan")),
        ("ste_clip", float("inf")),
        ("ste_clip", True),
        ("ste_clip", "2"),
    ],
)
def test_bad_field(field, value):
    with pytest.raises(ConfigError) as excinfo:
        QATConfig.parse("4-8-4", **{field: value})
    assert message(excinfo).startswith(field)


def test_unknown_and_missing_keys():
    with pytest.raises(ConfigError, match="unknown field 'groups'"):
        QATConfig.parse("4-8-4", groups=2)
    with pytest.raises(ConfigError, match="unknown field 'w_bits'"):
        QATConfig.parse("4-8-4", w_bits=8)
    with pytest.raises(ConfigError, match="missing kv_bits"):
        QATConfig.from_dict({"w_bits": 4, "a_bits": 8})
    with pytest.raises(ConfigError, match="unknown field"):
        QATConfig.from_dict({**QATConfig.parse("4-8-4").to_dict(), "extra": 1})
    with pytest.raises(ConfigError, match="object"):
        QATConfig.from_dict([4, 8, 4])


def test_specs():
    config = QATConfig.parse("4-16-8", group_size=64)
    assert config.weight == QuantSpec(4, 64, "bfloat16") and config.weight.enabled
    assert not config.activation.enabled and config.kv.enabled
    assert [QuantSpec(bits).qmax for bits in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]
    with pytest.raises(ConfigError):
        _ = QuantSpec(16).qmax
    assert not QATConfig.parse("16-32-4").quantizes_linears


@pytest.mark.parametrize("setting", ["4-8-4", "8-8-8", "2-2-16", "4-16-32"])
def test_packable(setting):
    QATConfig.parse(setting).check_packable()


@pytest.mark.parametrize(
    ("setting", "field"), [("16-8-4", "w_bits"), ("4-8-6", "kv_bits"), ("4-8-2", "kv_bits")]
)
def test_not_packable(setting, field):
    with pytest.raises(ConfigError, match=field):
        QATConfig.parse(setting).check_packable()


def test_defaults_of_the_later_fields_are_todays_behaviour():
    old = {"w_bits": 4, "a_bits": 8, "kv_bits": 4, "kv_mode": "paper", "group_size": -1}
    old |= {"weight_scale_dtype": "bfloat16", "ste_clip": None}
    config = QATConfig.from_dict(old)
    assert config == QATConfig.parse("4-8-4")
    assert config.to_record() == old
    changed = QATConfig.parse("4-4-4", a_group_size=1)
    assert changed.to_record() == {**old, "a_bits": 4, "a_group_size": 1}
    assert QATConfig.from_dict(changed.to_record()) == changed


@pytest.mark.parametrize(
    ("setting", "fields", "field"),
    [
        ("4-8-4", {"w_quantizer": "lsq"}, "w_quantizer"),
        ("4-8-4", {"a_quantizer": "statsq"}, "a_quantizer"),
        ("4-8-4", {"kv_quantizer": None}, "kv_quantizer"),
        ("4-8-4", {"numerics": "paper"}, "numerics"),
        ("4-8-4", {"a_group_size": 0}, "a_group_size"),
        ("4-8-4", {"a_group_size": True}, "a_group_size"),
        ("4-8-4", {"a_group_size": 4, "a_group_axis": "token"}, "a_group_axis"),
        ("4-8-4", {"a_group_axis": "channel_per_token"}, "a_group_axis"),
        ("4-16-4", {"a_group_size": 4}, "a_group_size"),
        ("4-4-4", {"a_group_size": 4, "a_quantizer": "lsq"}, "a_group_size"),
        ("4-4-4", {"a_group_size": 4, "numerics": "official"}, "a_group_size"),
        ("16-8-4", {"w_quantizer": "asymmetric"}, "w_quantizer"),
        ("4-16-4", {"a_quantizer": "lsq"}, "a_quantizer"),
        ("4-8-16", {"kv_quantizer": "asymmetric"}, "kv_quantizer"),
        ("4-8-4", {"numerics": "official", "w_quantizer": "statsq"}, "w_quantizer"),
        ("2-8-4", {"numerics": "official", "w_quantizer": "asymmetric"}, "w_quantizer"),
        ("2-8-4", {"numerics": "official", "w_quantizer": "statsq"}, "w_quantizer"),
        ("4-8-4", {"numerics": "official", "a_quantizer": "lsq"}, "a_quantizer"),
        ("4-8-4", {"numerics": "official", "group_size": 32}, "group_size"),
    ],
)
def test_impossible_combinations(setting, fields, field):
    with pytest.raises(ConfigError) as excinfo:
        QATConfig.parse(setting, **fields)
    assert message(excinfo).startswith(field)


def test_official_numerics_cut_gradients_at_two_and_quantize_16_bits():
    config = QATConfig.parse("4-16-32", numerics="official", a_quantizer="asymmetric")
    assert config.ste_clip == 2.0 and config.activation.enabled and not config.kv.enabled
    assert not config.activation.has_codes and not config.weight.has_codes
    assert QATConfig.parse("4-8-4", numerics="official", ste_clip=1e9).ste_clip == 1e9


@pytest.mark.parametrize(
    "fields",
    [
        {"w_quantizer": "asymmetric"},
        {"a_quantizer": "lsq"},
        {"kv_quantizer": "asymmetric"},
        {"numerics": "official"},
        {"a_group_size": 4},
    ],
)
def test_comparisons_are_never_packed(fields):
    with pytest.raises(ConfigError) as excinfo:
        QATConfig.parse("4-4-4", **fields).check_packable()
    assert message(excinfo).startswith(next(iter(fields)))
