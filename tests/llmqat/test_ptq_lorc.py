"""LoRC: the float side branch that is measured in Python and never saved."""

import pytest
import torch

import llmqat
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.ptq import compensate, float_weights, rtn
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("4-16-16")


def test_compensation_is_for_measuring_only(tmp_path):
    """LoRC at full rank restores the weights; such a model refuses to be saved."""
    tokens = random_tokens(0, 2, 16)
    plain = tiny_llama(kv_heads=4)
    weights = float_weights(plain)
    with torch.no_grad():
        expected = plain(tokens).logits
        errors = []
        for rank in (1, 16, 64):
            model = compensate(rtn(tiny_llama(kv_heads=4), CONFIG), weights, rank)
            errors.append(float((model(tokens).logits - expected).square().mean()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 1e-8
    with pytest.raises(ConfigError, match="QuantizedLinear"):
        llmqat.save_pretrained(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="already"):
        compensate(model, weights, 1)
    packed = rtn(tiny_llama(kv_heads=4), QATConfig.parse("4-8-4"))
    with pytest.raises(ConfigError, match="rank: 0"):
        compensate(packed, weights, 0)
    with pytest.raises(ConfigError, match="rank: 65"):
        compensate(packed, weights, 65)
    with pytest.raises(ConfigError, match="missing"):
        compensate(packed, {}, 1)
    with pytest.raises(ConfigError, match="not packed"):
        compensate(tiny_llama(), weights, 1)
    with torch.no_grad():
        assert torch.isfinite(compensate(packed, weights, 2)(tokens).logits).all()
