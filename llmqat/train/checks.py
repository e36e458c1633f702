"""What a :class:`QATTrainer` refuses before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmqat.errors import ConfigError
from llmqat.models.heads import plain_head
from llmqat.state import PACKED, state_of
from llmqat.train.losses import Loss
from llmqat_kernels.nn import QATLinear

__all__ = ["check_data", "check_pair", "check_saved", "check_student"]


def check_student(model: nn.Module) -> None:
    """A prepared model with fp32 parameters and a plain head."""
    plain_head("student", model)
    state = state_of(model)
    if state is not None and state.stage == PACKED:
        raise ConfigError(
            "student: is converted, an inference form; give QATTrainer the prepared model"
        )
    if state is None and not any(isinstance(module, QATLinear) for module in model.modules()):
        raise ConfigError(
            "student: nothing of it is quantized; call llmqat.prepare(model, config) first"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"student: {name} is {dtype}, too coarse to hold its updates;"
                " load it in float32 (bf16 autocast is an option of the training)"
            )


def check_data(rows: Any, student: nn.Module) -> None:
    """The first row stands for all; their lengths show when a batch is made."""
    if len(rows) == 0:
        raise ConfigError("train_dataset: is empty; give it rows of input_ids")
    if "input_ids" not in rows[0]:
        raise ConfigError(
            f"train_dataset: a row has {', '.join(rows[0])} and no input_ids, int64 [T]"
        )
    ids, size = torch.as_tensor(rows[0]["input_ids"]), plain_head("student", student).out_features
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        wrong = int(ids.min() if int(ids.min()) < 0 else ids.max())
        raise ConfigError(
            f"train_dataset: id {wrong} is outside the vocabulary of {size}; was it made with"
            " another tokenizer?"
        )


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Two models with one vocabulary."""
    own, other = (
        plain_head(role, model) for role, model in (("student", student), ("teacher", teacher))
    )
    if teacher is student or own.weight is other.weight:
        raise ConfigError("teacher: shares its weights with the student; load it a second time")
    if own.weight.shape[0] != other.weight.shape[0]:
        raise ConfigError(
            f"teacher: vocabulary of {other.weight.shape[0]}, but the student has"
            f" {own.weight.shape[0]}; they must be equal"
        )


def check_saved(loss: Loss, teacher: nn.Module | None) -> None:
    """A saved teacher has its probabilities and nothing else."""
    if teacher is not None:
        raise ConfigError("teacher: the data has a saved one already; give only one of them")
    if loss.watches():
        raise ConfigError(
            f"loss: {loss.name} compares the blocks of a loaded teacher; saved teacher logits serve"
            " logits and label+logits"
        )
