"""Round to nearest is `convert`, by another name."""

import pytest
import torch

from llmqat.config import QATConfig
from llmqat.convert import convert
from llmqat.errors import ConfigError
from llmqat.ptq import rtn
from tests.llmqat.tiny import tiny_llama


@pytest.mark.parametrize("fields", [{}, {"group_size": 16}])
def test_equals_convert(fields):
    config = QATConfig.parse("4-8-4", **fields)
    ours, theirs = rtn(tiny_llama(), config), convert(tiny_llama(), config)
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_refuses():
    with pytest.raises(ConfigError, match="w_bits"):
        rtn(tiny_llama(), QATConfig.parse("16-8-8"))
