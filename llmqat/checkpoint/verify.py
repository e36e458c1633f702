"""Proof that a written folder is the model: reload it and compare everything bit for bit."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import torch
from torch import nn

from llmqat.checkpoint.load import from_pretrained
from llmqat.errors import CheckpointError
from llmqat.state import state_of


@dataclass(frozen=True)
class ExportCheck:
    """What was compared, all equal."""

    tensors: int
    elements: int
    logits: int

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)


def verify_export(
    model: nn.Module, directory: str | os.PathLike[str], *, tokens: torch.Tensor | None = None
) -> ExportCheck:
    """Reload `directory` and compare codes, scales, every other tensor and the logits of a sample,
    bit for bit.

    Args:
        model: the model that was saved without a `dtype` of its own.
        tokens: int64 [B, T] for the logits; by default 2 x 16 ids spread over the vocabulary.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    loaded = from_pretrained(directory)
    if state_of(loaded) != state_of(model):
        raise CheckpointError(f"{directory}: settings differ from the model's; export it again")
    ours, theirs = model.state_dict(), loaded.state_dict()
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        raise CheckpointError(
            f"{directory}: {name} is in only one of model and folder; export it again"
        )
    for name, tensor in ours.items():
        other, mine = theirs[name], tensor.cpu()
        if other.dtype != mine.dtype or not _same_bits(other, mine):
            raise CheckpointError(f"{directory}: {name} differs from the model's; export it again")
    if tokens is None:
        vocab = model.config.vocab_size
        tokens = (torch.arange(32, dtype=torch.int64) * 7919 % vocab).view(2, 16)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # The mask says that ids which happen to be the padding id are no padding.
            tokens = tokens.to(device)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            expected = model(**inputs).logits
            got = loaded.to(device)(**inputs).logits
    finally:
        model.train(was_training)
    if not _same_bits(expected, got):
        raise CheckpointError(f"{directory}: logits of the reloaded model differ; export it again")
    return ExportCheck(len(ours), sum(tensor.numel() for tensor in ours.values()), expected.numel())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
