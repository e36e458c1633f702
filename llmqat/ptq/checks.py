"""Argument checks that the post-training methods share; every message is one line."""

from __future__ import annotations

import math

import torch
from torch import nn

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_linears
from llmqat.nn.conv1d import row_weight
from llmqat.ptq.channels import FOLDS
from llmqat.state import state_of


def check_plain(model: nn.Module, config: QATConfig | None) -> None:
    """ConfigError unless `model` is plain, finite, and (if given) can be packed by `config`.

    Asked before anything is changed or computed, so that a mistake costs no calibration.
    """
    state = state_of(model)
    if state is not None:
        raise ConfigError(
            f"model: already {state.stage} ({state.config.setting}); post-training methods start"
            " from a full-precision model"
        )
    family = find_family(model)
    if config is not None:
        if not isinstance(config, QATConfig):
            raise ConfigError(
                f"config: expected a QATConfig, got {type(config).__name__}; use"
                " QATConfig.parse('4-8-8')"
            )
        config.check_packable()
    for name, _, module in iter_linears(model, family):
        if not family.is_linear(module):
            raise ConfigError(
                f"{name}: expected a plain nn.{family.linear_class}, found {type(module).__name__}"
            )
        if (
            config is not None
            and config.group_size != -1
            and (columns := row_weight(module).shape[1]) % config.group_size
        ):
            raise ConfigError(
                f"group_size: {config.group_size} does not divide the {columns} input"
                f" columns of {name}"
            )
        if not bool(torch.isfinite(module.weight).all()):
            raise ConfigError(f"{name}: weight has NaN or infinite values; it cannot be quantized")


def check_fraction(name: str, value: object, *, zero: bool = True) -> None:
    """ConfigError unless `value` is a number in 0..1 (0 itself only where `zero`)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if not good or (value == 0 and not zero):
        low = "0" if zero else "more than 0"
        raise ConfigError(f"{name}: {value!r} is not supported; use a number from {low} to 1")


def check_count(name: str, value: object, low: int) -> None:
    """ConfigError unless `value` is an integer >= low."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}: {value!r} is not supported; use an integer >= {low}")


def check_positive(name: str, value: object) -> None:
    """ConfigError unless `value` is a finite number > 0."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}: {value!r} is not supported; use a positive number")


def check_token_limit(value: object) -> None:
    """ConfigError unless `value` is 0 or a finite number >= 1."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or (value != 0 and value < 1):
        raise ConfigError(
            f"token_limit: {value!r} is not supported; use a number >= 1, or 0 for no limit"
        )


def check_fold(folds: object) -> None:
    """ConfigError unless `folds` is one of the names of `FOLDS`."""
    if not isinstance(folds, str) or folds not in FOLDS:
        raise ConfigError(f"folds: {folds!r} is not supported; use {', '.join(FOLDS)}")
