"""Codes of a weight, computed once per value of the weight."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import llmqat_kernels as qk

# Optimizers may write parameters without telling autograd (`p.data`, fused kernels of other
# packages), which leaves the version counter alone. Every `Optimizer.step` therefore starts a new
# epoch, and old codes with it.
_optimizer_epoch = 0


def _next_epoch(*_: Any) -> None:
    global _optimizer_epoch
    _optimizer_epoch += 1


_epoch_hook = register_optimizer_step_post_hook(_next_epoch)


class _Entry(NamedTuple):
    """Weight codes and what they were computed from."""

    weight: weakref.ref[Tensor]
    key: tuple[Any, ...]
    codes: Tensor
    scale: Tensor


class WeightCodes:
    """The codes of one weight, shared by micro-batches, activation checkpointing and backward.

    They are found stale by tensor, address, version counter, optimizer steps and settings; after
    writing through `weight.data` in any other way call :meth:`clear`. While torch.compile traces,
    nothing is kept, nor ever where `keep` is False: for weights that exist only during a forward
    (FSDP). A copy or a pickle is empty: it will belong to another weight.
    """

    def __init__(self) -> None:
        self.keep = True
        self._entry: _Entry | None = None

    def get(
        self, weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``quantize(weight, bits, ...)`` of weight float [N, K]: codes int8 [N, K], scales fp32
        [N] or [N, K / group_size] (spec 3, 4).
        """

        def quantize() -> tuple[Tensor, Tensor]:
            return qk.quantize(
                weight.detach(), bits, group_size=group_size, scale_dtype=scale_dtype
            )

        passing = torch.compiler.is_compiling() or weight.is_meta or weight.is_inference()
        if passing or not self.keep:
            return quantize()
        # A view (the transpose of a parameter) is made anew for every forward: its base is what
        # lives on.
        owner = weight if weight._base is None else weight._base
        place = (weight._version, weight.data_ptr(), weight.shape, weight.stride())
        key = (_optimizer_epoch, *place, bits, group_size, scale_dtype)
        entry = self._entry
        if entry is not None and entry.weight() is owner and entry.key == key:
            return entry.codes, entry.scale
        # Codes made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False):
            codes, scale = quantize()
        self._entry = _Entry(weakref.ref(owner), key, codes, scale)
        return codes, scale

    def clear(self) -> None:
        """Forget the codes."""
        self._entry = None

    def __reduce__(self) -> tuple[type[WeightCodes], tuple[()]]:
        return WeightCodes, ()
