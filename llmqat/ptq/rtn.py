"""Round to nearest: every weight to the nearest point of its row's grid, nothing else."""

from __future__ import annotations

from torch import nn

from llmqat.config import QATConfig
from llmqat.convert import convert

__all__ = ["rtn"]


def rtn(model: nn.Module, config: QATConfig) -> nn.Module:
    """Pack a plain model by round-to-nearest, in place (spec 1-4); no data is needed.

    Raises:
        ConfigError: as `llmqat.convert`.
    """
    return convert(model, config)
