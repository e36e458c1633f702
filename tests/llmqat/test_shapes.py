"""Released sizes, on the meta device: what is quantized, what a checkpoint of each would hold."""

import copy
import json

import pytest
import torch

from llmqat.checkpoint.architecture import parse_architecture
from llmqat.checkpoint.format import HEAD, expected_tensors
from llmqat.config import QATConfig
from llmqat.convert import prepare, swap_empty
from llmqat.errors import ConfigError
from llmqat.eval.cost import GIB, ModelShape, weight_bytes
from llmqat.models import compat
from llmqat.models.families import find_family, iter_linears
from llmqat.models.shapes import SHAPES, find_shape
from llmqat.nn.linear import QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear

BILLIONS = {
    "llama-7b": 6.476,
    "llama-2-7b": 6.476,
    "llama-13b": 12.688,
    "llama-2-13b": 12.688,
    "llama-30b": 32.102,
    "llama-65b": 64.760,
    "llama-2-70b": 68.451,
    "llama-3-8b": 6.979,
    "llama-3.1-8b": 6.979,
    "llama-3.2-1b": 0.973,
    "llama-3.2-3b": 2.819,
    "mistral-7b": 6.979,
    "qwen2-7b": 6.525,
    "qwen3-8b": 6.946,
    "gpt2": 0.085,
}
"""Weights of all quantized linears, counted by hand from the published sizes."""


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_on_meta(name):
    row, setting = find_shape(name), QATConfig.parse("4-8-4", kv_mode="serving")
    plain = compat.build_model(row.family, row.fields, torch.bfloat16)
    family = find_family(plain)
    size = ModelShape.from_config(plain.config)
    config = json.loads(plain.config.to_json_string(use_diff=False))
    arch = parse_architecture(config, "config")
    assert arch.layers == size.layers
    assert {n: tuple(t.shape) for n, t in plain.state_dict().items() if n != HEAD} == {
        n: rule.shape
        for n, rule in expected_tensors(arch, None).items()
        if not rule.optional and n != HEAD
    }
    packed = copy.deepcopy(plain)
    prepare(plain, setting)
    linears = [module for _, _, module in iter_linears(plain, family)]
    assert all(isinstance(module, QATLinear) for module in linears)
    count = sum(module.weight.numel() for module in linears)
    assert count == size.linear_parameters()
    if name in BILLIONS:
        assert round(count / 1e9, 3) == BILLIONS[name]
    biases = {n: torch.float32 for n, s, _ in iter_linears(packed, family) if arch.has_bias(s)}
    swap_empty(packed, setting, biases)
    linears = [module for _, _, module in iter_linears(packed, family)]
    assert all(isinstance(module, QuantizedLinear) for module in linears)
    assert sum(m.in_features * m.out_features for m in linears) == count
    assert all(tensor.is_meta for tensor in packed.state_dict().values())


def test_paper_sizes():
    """LLM-QAT table 7 and its like for 13B and 30B, in GiB."""
    for name, sizes in {
        "llama-2-7b": (12.55, 6.52, 3.50),
        "llama-13b": (24.24, 12.43, 6.52),
        "llama-30b": (60.59, 30.69, 15.74),
    }.items():
        for bits, gib in zip((16, 8, 4), sizes, strict=True):
            found = weight_bytes(find_shape(name).config(), QATConfig(bits, 16, 16))
            assert round((found.linears + found.embedding + found.head) / GIB, 2) == gib


def test_unknown_name():
    with pytest.raises(ConfigError, match="shape: 'gpt5' is unknown; use one of llama-7b"):
        find_shape("gpt5")
