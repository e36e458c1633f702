"""Health of a training run: are the codes still moving, and do gradients still arrive?

A run can have a falling loss and still be sick: codes that never flip mean that the learning rate
cannot move a weight across a rounding boundary; a large share at the ends of the range means that
rows are dominated by outliers; a large share of zeroed gradients means that `ste_clip` cuts real
signal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.nn import QATLinear
from llmqat.train import sharding
from llmqat_kernels.nn import GatedRows, QuantizedRows
from llmqat_kernels.spec.quantize import qmax

__all__ = ["Count", "HealthMonitor", "clipped", "flipped", "saturated"]

OVERALL = ""


@dataclass
class Count:
    """`hits` of `total` elements; counts of layers and batches add up."""

    hits: int = 0
    total: int = 0

    def __iadd__(self, other: Count) -> Count:
        self.hits += other.hits
        self.total += other.total
        return self

    @property
    def share(self) -> float:
        """`hits / total`, 0 for nothing counted."""
        return self.hits / self.total if self.total else 0.0


def flipped(before: Tensor, after: Tensor) -> Count:
    """Codes that differ; int8 tensors of one shape."""
    return Count(int((before != after).sum()), after.numel())


def saturated(codes: Tensor, bits: int) -> Count:
    """Codes at either end of the range, `|code| == 2^(bits-1) - 1` (spec 1). int8 of any shape."""
    return Count(int((codes.abs() == qmax(bits)).sum()), codes.numel())


def clipped(x: Tensor, ste_clip: float) -> Count:
    """Elements whose gradient `ste_clip` zeroes: `|x| >= ste_clip` (spec 6). Float of any shape."""
    return Count(int((x.detach().abs() >= ste_clip).sum()), x.numel())


Counts = dict[str, dict[str, Count]]
"""metric -> layer group -> count; the group `OVERALL` is all of them."""


def _empty() -> Counts:
    return defaultdict(lambda: defaultdict(Count))


def _add(counts: Counts, metric: str, group: str, count: Count) -> None:
    counts[metric][OVERALL] += count
    counts[metric][group] += count


class HealthMonitor:
    """Counts over the `QATLinear` layers of a prepared model, overall and by group (q_proj, ...).

    `report()` gives, as shares in [0, 1]:

    * `health/flipped`: weight codes that differ from those of the previous report (or `reset`);
    * `health/weight_saturated`, `health/activation_saturated`: codes at the ends of their range;
    * `health/weight_clipped`, `health/activation_clipped`: gradients zeroed by `ste_clip`, where it
      is set;

    each followed by `/<group>` for one group. Activations are those seen under `watch()`. The codes
    are the layers' own (`QATLinear.weight_codes`), which the next forward uses anyway; one int8
    copy of all is kept. Of several processes each counts its rows of a sharded weight and its
    batches, and all report the sums.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            name: module for name, module in model.named_modules() if isinstance(module, QATLinear)
        }
        self._codes: dict[str, Tensor] = {}
        self._activations = _empty()

    def reset(self) -> None:
        """Take the present codes as those of the previous report; forget the activations seen."""
        self._codes = {}
        for name, layer in self._quantized_weights():
            with sharding.local_weight(layer):
                self._codes[name] = layer.weight_codes()[0]
        self._activations = _empty()

    def _quantized_weights(self) -> Iterator[tuple[str, QATLinear]]:
        return ((name, layer) for name, layer in self.layers.items() if layer.spec.weight.has_codes)

    @contextmanager
    def watch(self, active: bool = True) -> Iterator[None]:
        """Count the inputs of every layer inside the block; does nothing unless `active`."""
        layers = self.layers.items() if active else ()
        handles = [
            layer.register_forward_pre_hook(self._hook(_group(name))) for name, layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, group: str) -> Any:
        def count(layer: QATLinear, inputs: tuple[Tensor | QuantizedRows | GatedRows, ...]) -> None:
            spec, x = layer.spec, inputs[0]
            if isinstance(x, GatedRows):
                parts = GatedRows(*(part.detach() for part in x))
                x = parts.quantize(spec.activation.bits, values=spec.ste_clip is not None)
            if spec.activation.has_codes and spec.activation.group_size == -1:
                if isinstance(x, QuantizedRows):
                    x, codes = x.values, x.codes
                else:
                    codes, _ = qk.quantize(x.detach(), spec.activation.bits)
                _add(
                    self._activations,
                    "activation_saturated",
                    group,
                    saturated(codes, spec.activation.bits),
                )
                if spec.ste_clip is not None:
                    _add(self._activations, "activation_clipped", group, clipped(x, spec.ste_clip))

        return count

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The shares since the previous report, which this one replaces."""
        counts = _empty()
        previous, self._codes = self._codes, {}
        for name, layer in self._quantized_weights():
            group, spec = _group(name), layer.spec
            with sharding.local_weight(layer) as weight:
                codes = layer.weight_codes()[0]
                self._codes[name] = codes
                if name in previous:
                    _add(counts, "flipped", group, flipped(previous[name], codes))
                _add(counts, "weight_saturated", group, saturated(codes, spec.weight.bits))
                if spec.ste_clip is not None:
                    _add(counts, "weight_clipped", group, clipped(weight, spec.ste_clip))
        counts |= self._activations
        self._activations = _empty()
        _add_processes(counts)
        return {
            f"health/{metric}/{group}".rstrip("/"): count.share
            for metric, groups in counts.items()
            for group, count in groups.items()
        }


def _add_processes(counts: Counts) -> None:
    """Add the counts of the other processes: their rows of the weights, their batches."""
    flat = [count for groups in counts.values() for count in groups.values()]
    table = torch.tensor([(count.hits, count.total) for count in flat], dtype=torch.int64)
    sharding.sum_over_processes(table)
    for count, (hits, total) in zip(flat, table.tolist(), strict=True):
        count.hits, count.total = hits, total


def _group(name: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `up_proj`."""
    return name.rpartition(".")[2]
