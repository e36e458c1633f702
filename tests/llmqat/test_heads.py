"""Heads: their operands give the logits, and only plain ones are taken."""

import pytest
import torch
from torch import nn

from llmqat.errors import ConfigError
from llmqat.models.heads import last_hidden, plain_head
from tests.llmqat.tiny import random_tokens, tiny_llama


def test_head_of_hidden_is_the_logits():
    model = tiny_llama()
    ids = random_tokens(0, 2, 7)
    hidden = last_hidden(model, {"input_ids": ids})
    assert hidden.shape == (2, 7, 64)
    assert torch.equal(plain_head("model", model)(hidden), model(ids).logits)


def test_the_head_comes_back_after_an_error():
    model = tiny_llama()
    with pytest.raises(IndexError):
        last_hidden(model, {"input_ids": torch.tensor([[10**6]])})
    assert model(random_tokens(0, 1, 3)).logits.shape == (1, 3, 128)


def test_refusals():
    model = tiny_llama()
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="teacher: logit_scale changes the logits after the head"):
        plain_head("teacher", model)
    model.lm_head = nn.Linear(64, 128)
    with pytest.raises(ConfigError, match="teacher: LlamaForCausalLM has no plain linear head"):
        plain_head("teacher", model)
