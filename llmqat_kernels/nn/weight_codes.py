"""Codes of a weight, computed once per value of the weight."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

import llmqat_kernels as qk

from ..spec.quantize import group_scales

# Optimizers may write parameters without telling autograd (`p.data`, fused kernels of other
# packages), which leaves the version counter alone. Every `Optimizer.step` therefore starts a new
# epoch, and old codes with it.
_optimizer_epoch = 0


def _next_epoch(*_: Any) -> None:
    global _optimizer_epoch
    _optimizer_epoch += 1


_epoch_hook = register_optimizer_step_post_hook(_next_epoch)

_whole_step: object | None = None


@contextmanager
def whole_step() -> Iterator[None]:
    """Around the capture of a CUDA graph that holds a whole training step: forward, backward and
    the optimizer. Codes of weights are kept within it, as they are without a graph.

    Elsewhere a capture keeps none, since the graph that made them might not be the next to replay.

    >>> with torch.cuda.graph(graph), whole_step():  # doctest: +SKIP
    ...     loss = compute_loss(model, batch)
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    """
    global _whole_step
    outer, _whole_step = _whole_step, object()
    try:
        yield
    finally:
        _whole_step = outer


class QuantizedWeight(NamedTuple):
    """Codes int8 [N, K] of a weight and their scales: fp32 [N] or [N, K / group_size] (spec 3, 4),
    or, with integer group scales, fp32 [N] and multipliers uint8 [N, K / group_size] (spec 18).
    """

    codes: Tensor
    scale: Tensor
    multiplier: Tensor | None = None

    @property
    def scales(self) -> Tensor:
        """What a code is multiplied by, fp32 [N] or [N, K / group_size]."""
        return group_scales(self.scale, self.multiplier)


class _Entry(NamedTuple):
    """Weight codes and what they were computed from."""

    weight: weakref.ref[Tensor]
    key: tuple[Any, ...]
    quantized: QuantizedWeight


class WeightCodes:
    """The codes of one weight, shared by micro-batches, activation checkpointing and backward.

    They are found stale by tensor, address, version counter, optimizer steps and settings; after
    writing through `weight.data` in any other way call :meth:`clear`. Nothing is kept while a graph
    is traced or captured (but see :func:`whole_step`), nor outside it once there was a capture,
    whose replays may write the weight and nothing here would know; nor ever where `keep` is False:
    for weights that exist only during a forward (FSDP). A copy or a pickle is empty: it will belong
    to another weight.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._entry: _Entry | None = None
        self._was_captured = False

    def get(
        self, weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """``quantize(weight, bits, ...)`` of weight float [N, K] (spec 3, 4); with ``scale_dtype``
        uint8 ``quantize_integer_groups`` (spec 18).
        """

        def quantize() -> QuantizedWeight:
            values = weight.detach()
            if scale_dtype == torch.uint8:
                codes, multiplier, scale = qk.quantize_integer_groups(
                    values, bits, group_size=group_size
                )
                return QuantizedWeight(codes, scale, multiplier)
            return QuantizedWeight(
                *qk.quantize(values, bits, group_size=group_size, scale_dtype=scale_dtype)
            )

        if torch.compiler.is_compiling() or not self.keep or _passing(weight):
            return quantize()
        captured = _captured(weight)
        self._was_captured |= captured
        graph = _whole_step if captured else None
        if self._was_captured and graph is None:
            self.clear()
            return quantize()
        # A view (the transpose of a parameter) is made anew for every forward: its base is what
        # lives on.
        owner = weight if weight._base is None else weight._base
        place = (weight._version, weight.data_ptr(), weight.shape, weight.stride())
        key = (graph, _optimizer_epoch, *place, bits, group_size, scale_dtype)
        entry = self._entry
        if entry is not None and entry.weight() is owner and entry.key == key:
            return entry.quantized
        # Codes made under inference_mode could not be saved for a later backward. A mode that
        # records operators to give their results back in a second pass (selective activation
        # checkpointing) must see them in both passes or in none, and the second finds them here.
        with torch.inference_mode(False), _disable_current_modes():
            quantized = quantize()
        self._entry = _Entry(weakref.ref(owner), key, quantized)
        return quantized

    def clear(self) -> None:
        """Forget the codes."""
        self._entry = None

    def __reduce__(self) -> tuple[type[WeightCodes], tuple[bool]]:
        return WeightCodes, (self.keep,)


def _passing(weight: Tensor) -> bool:
    """Whether `weight` is no lasting memory of its own: a stand-in, a shard, or written to a graph
    that would hold its codes as constants.
    """
    if weight.is_meta or weight.is_inference():
        return True
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    modes = _get_current_dispatch_mode_stack()
    if modes and any(mode.is_infra_mode() for mode in modes):
        return True
    return _len_torch_dispatch_stack_pre_dispatch() > 0


def _captured(weight: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which would replay without the kept codes' kernel."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
