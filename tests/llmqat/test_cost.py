"""Costs against the numbers of the LLM-QAT paper and against a model's own parameter count."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.eval.cost import (
    GIB,
    ModelShape,
    cost,
    kv_bytes_per_token,
    macs,
    ops,
    training_bytes,
    weight_bytes,
)
from llmqat.models.shapes import find_shape
from llmqat_kernels.errors import InvalidArgument


def _llama(hidden, intermediate, layers, heads, kv_heads=None, vocab=32000, **fields):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        **fields,
    )


MODELS = {
    "7B": _llama(4096, 11008, 32, 32),
    "13B": _llama(5120, 13824, 40, 40),
    "30B": _llama(6656, 17920, 60, 52),
    "65B": _llama(8192, 22016, 80, 64),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256),
}


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("7B", (12.55, 6.52, 3.50)),
        ("13B", (24.24, 12.43, 6.52)),
        ("30B", (60.59, 30.69, 15.74)),
    ],
)
def test_weight_sizes_of_the_paper(model, sizes):
    for bits, expected in zip((16, 8, 4), sizes, strict=True):
        weights = weight_bytes(MODELS[model], QATConfig(bits, 8, 16))
        counted = weights.linears + weights.embedding + weights.head
        assert round(counted / GIB, 2) == expected
        # What the paper leaves out stays invisible beside it.
        assert (weights.scales + weights.norms) / counted < 0.003
        assert weights.total == counted + weights.scales + weights.norms


@pytest.mark.parametrize(
    ("model", "linears", "attention", "head"),
    [
        ("7B", 1.326e13, 1.100e12, 2.68e11),
        ("13B", 2.598e13, 1.718e12, 3.36e11),
        ("30B", 6.575e13, 3.350e12, 4.36e11),
    ],
)
def test_macs_of_the_paper(model, linears, attention, head):
    config = MODELS[model]
    base = macs(config)
    assert base == pytest.approx(linears, rel=5e-4)
    assert macs(config, include_attention=True) - base == pytest.approx(attention, rel=5e-4)
    assert macs(config, include_head=True) - base == pytest.approx(head, rel=5e-3)


def test_similar_operations_of_13b_w4a8_and_7b_w8a8():
    large = ops(MODELS["13B"], QATConfig.parse("4-8-16"))
    small = ops(MODELS["7B"], QATConfig.parse("8-8-16"))
    assert large == pytest.approx(8.315e14, rel=1e-4)
    assert small == pytest.approx(8.488e14, rel=1e-4)


def test_figures_as_the_paper_prints_them():
    """Sizes in "GB" (GiB) with one digit, operations of figure 1 with two."""
    sizes = [weight_bytes(MODELS["7B"], QATConfig(bits, 8, 16)).total / GIB for bits in (16, 8, 4)]
    assert [round(size, 1) for size in sizes] == [12.6, 6.5, 3.5]
    settings = (("13B", "4-8-16"), ("7B", "8-8-16"))
    counted = [ops(MODELS[model], QATConfig.parse(setting)) for model, setting in settings]
    assert [f"{count:.1e}" for count in counted] == ["8.3e+14", "8.5e+14"]


def test_speedups_of_figure_4():
    """A100 days of 5 million inferences of 30B: full precision, PTQ 8-8-8, LLM-QAT 4-8-8."""
    days = {"16-16-16": 4280, "8-8-8": 2743, "4-8-8": 586}
    assert round(days["16-16-16"] / days["8-8-8"], 2) == 1.56
    assert round(days["16-16-16"] / days["4-8-8"], 1) == 7.3
    # They are assumptions: operations alone would allow 4 and 8, weight bytes 2.0 and 3.8.
    counts = [ops(MODELS["30B"], QATConfig.parse(setting)) for setting in days]
    assert [counts[0] / count for count in counts] == [1, 4, 8]
    sizes = [weight_bytes(MODELS["30B"], QATConfig.parse(setting)).total for setting in days]
    assert [round(sizes[0] / size, 1) for size in sizes] == [1.0, 2.0, 3.8]


@pytest.mark.parametrize("name", ["7B", "13B", "30B", "65B", "Llama-2-70B", "Llama-3-8B"])
def test_named_shapes_are_the_same_models(name):
    known = name.lower() if name.startswith("L") else f"llama-{name.lower()}"
    assert ModelShape.from_config(find_shape(known).config()) == ModelShape.from_config(
        MODELS[name]
    )


def test_attention_and_head_are_counted_at_their_own_bits():
    config, qat = MODELS["7B"], QATConfig.parse("4-8-4")
    base = macs(config)
    attention = macs(config, include_attention=True) - base
    head = macs(config, include_head=True) - base
    both = ops(config, qat, include_attention=True, include_head=True)
    assert both == base * 4 * 8 + attention * 16 * 4 + head * 16 * 16


@pytest.mark.parametrize(
    ("model", "elements", "gib_at_32k"),
    [
        ("7B", 262_144, 16.0),
        ("13B", 409_600, 25.0),
        ("30B", 798_720, 48.8),
        ("65B", 1_310_720, 80.0),
        ("Llama-2-70B", 163_840, 10.0),
        ("Llama-3-8B", 65_536, 4.0),
    ],
)
def test_kv_table(model, elements, gib_at_32k):
    sixteen, eight, four = (
        kv_bytes_per_token(MODELS[model], QATConfig(16, 16, bits)) for bits in (16, 8, 4)
    )
    assert (sixteen.codes, eight.codes, four.codes) == (2 * elements, elements, elements // 2)
    assert sixteen.scales == 0
    assert sixteen.codes * 32768 / GIB == pytest.approx(gib_at_32k, abs=0.05)


def test_kv_scales_by_mode():
    config = MODELS["Llama-3-8B"]
    paper = kv_bytes_per_token(config, QATConfig(4, 8, 4, kv_mode="paper"))
    serving = kv_bytes_per_token(config, QATConfig(4, 8, 4, kv_mode="serving"))
    assert paper.scales == 2 * 32 * 4
    assert serving.scales == 2 * 32 * 8 * 4
    assert serving.total == serving.codes + serving.scales


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_agree_with_the_model(tied):
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    stored = sum(p.numel() for p in model.parameters())
    assert weight_bytes(config, QATConfig(32, 32, 32), float_bits=32).total == 4 * stored
    shapes = ModelShape.from_config(config).linears()
    layer = dict(model.model.layers[0].named_modules())
    found = {n.split(".")[-1]: tuple(m.weight.shape) for n, m in layer.items() if "_proj" in n}
    assert shapes == found


def test_training_bytes():
    """Shards: 16 bytes a parameter for the student, 2 for the teacher."""
    config = MODELS["30B"]
    parameters = weight_bytes(config, QATConfig(32, 32, 32), float_bits=32).total // 4
    one, eight = training_bytes(config, 1), training_bytes(config, 8)
    assert one.shards == 18 * parameters
    assert eight.shards == pytest.approx(one.shards / 8, rel=1e-9)
    assert (eight.student, eight.optimizer) == (eight.gradients, 2 * eight.gradients)
    assert one.gathered == eight.gathered
    assert eight.total == eight.shards + eight.gathered
    # The table of docs/distributed.md.
    totals = [training_bytes(MODELS[name], 8).total / GIB for name in ("7B", "13B", "30B")]
    assert [round(total, 1) for total in totals] == [18.4, 33.5, 78.1]
    with pytest.raises(InvalidArgument, match="processes"):
        training_bytes(config, 0)


def test_groups_and_odd_columns():
    config = _llama(65, 33, 1, 5, vocab=7, head_dim=14)
    per_row = weight_bytes(config, QATConfig(4, 8, 16))
    assert per_row.scales == 4 * (3 * 70 + 65 + 2 * 33 + 65)
    assert per_row.linears == 3 * 70 * 33 + 65 * 35 + 2 * 33 * 33 + 65 * 17
    grouped = weight_bytes(config, QATConfig(4, 8, 16, group_size=32))
    assert grouped.scales == 4 * (3 * 70 * 3 + 65 * 3 + 2 * 33 * 3 + 65 * 2)


def test_cost_collects_everything():
    config, qat = MODELS["7B"], QATConfig.parse("4-8-4", kv_mode="serving")
    record = cost(config, qat, 1024, include_head=True)
    assert record.setting == "4-8-4"
    assert record.macs == macs(config, 1024, include_head=True)
    assert record.ops == ops(config, qat, 1024, include_head=True)
    values = record.to_dict()
    assert values["weights"]["total"] == weight_bytes(config, qat).total
    assert values["kv_per_token"]["total"] == kv_bytes_per_token(config, qat).total


def test_errors():
    with pytest.raises(ConfigError, match="hidden_size"):
        ModelShape.from_config(object())
    experts = _llama(64, 64, 1, 4)
    experts.num_local_experts = 8
    with pytest.raises(ConfigError, match="num_local_experts"):
        macs(experts)
    with pytest.raises(InvalidArgument, match="seq_len"):
        macs(MODELS["7B"], 0)
    with pytest.raises(InvalidArgument, match="float_bits"):
        weight_bytes(MODELS["7B"], QATConfig(4, 8, 4), float_bits=8)
