"""What an entry is: shapes, the least work it can cost, the call, its baselines, its gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmqat_kernels import use_backend
from llmqat_kernels.testing import assert_same_bits, assert_within_ratio

Call = Callable[[], Any]
"""One run of an op or of a baseline: a tensor, or a tuple whose first tensor is compared."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one row of the table, and the model whose layer has them."""

    model: str
    sizes: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def label(self) -> str:
        """``SmolLM2 M=1 N=1536 K=576``."""
        return " ".join([self.model, *(f"{name}={value}" for name, value in self.sizes.items())])


@dataclass(frozen=True)
class Cost:
    """Floors: the traffic and the arithmetic that no implementation of the op can avoid.

    ``bytes``: every input read once, every output written once. ``flops``: floating-point
    operations; ``int_ops``: operations of an int8 dot product (a multiply-add is two of either).
    """

    bytes: int
    flops: int = 0
    int_ops: int = 0


@dataclass(frozen=True)
class Job:
    """An entry on tensors: the call, what a user would run instead, and the gate.

    ``gate`` raises AssertionError unless the call equals the reference backend. ``agreement`` is
    the relative difference allowed between the op and each baseline: a baseline that computes
    something else is no baseline (None: results are random numbers and cannot be compared).
    ``optional``: makers of baselines that may be missing on a machine (other packages, compiled
    code); one that fails is named with the reason and left out.
    """

    call: Call
    baselines: Mapping[str, Call]
    gate: Callable[[], None]
    agreement: float | None
    optional: Mapping[str, Callable[[], Call]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The shapes and dtypes of an entry on one type of device."""

    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One op (or one variant of it) of the table, with the sizes it is measured at by device."""

    op: str
    variant: str
    cost: Callable[[Shape, torch.dtype], Cost]
    build: Callable[[Shape, torch.dtype, torch.device], Job]
    cpu: Grid = Grid()
    cuda: Grid = Grid()

    def grid(self, device_type: str) -> Grid:
        """Sizes on ``cpu`` or ``cuda``; an empty grid is not measured there."""
        return self.cuda if device_type == "cuda" else self.cpu

    @property
    def any_grid(self) -> Grid:
        """The CPU's sizes, or the GPU's where there are none."""
        return self.cpu if self.cpu.shapes else self.cuda

    def bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Least traffic of one call."""
        return self.cost(shape, dtype).bytes

    def flops(self, shape: Shape, dtype: torch.dtype) -> int:
        """Least arithmetic of one call, floating-point and integer."""
        cost = self.cost(shape, dtype)
        return cost.flops + cost.int_ops


def first(result: Any) -> Tensor:
    """The tensor of a result that baselines are compared by."""
    return result if isinstance(result, Tensor) else result[0]


def everything(result: Any) -> tuple[Tensor, ...]:
    """All tensors of a result."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def on_reference(call: Call) -> Any:
    """The result of ``call`` on the reference backend."""
    with use_backend("reference"):
        return call()


def same_bits(call: Call) -> Callable[[], None]:
    """Gate: every output equals the reference backend's, bit for bit."""

    def gate() -> None:
        pairs = zip(everything(call()), everything(on_reference(call)), strict=True)
        for index, (actual, expected) in enumerate(pairs):
            assert_same_bits(actual, expected, f"output {index}")

    return gate


def within_ratio(
    call: Call, exact: Callable[[], Any], ratio: float = 2.0, slack: float = 1e-6
) -> Callable[[], None]:
    """Gate for float sums: the error against fp64 ``exact()`` is at most ``ratio`` x that of the
    reference.
    """

    def gate() -> None:
        outputs = everything(call()), everything(on_reference(call)), everything(exact())
        for actual, reference, want in zip(*outputs, strict=True):
            assert_within_ratio(actual.detach(), reference.detach(), want, ratio, slack)

    return gate


def check_baselines(job: Job) -> None:
    """Raise AssertionError naming the first baseline that computes something else than the op."""
    if job.agreement is None:
        return
    ours = first(job.call()).detach()
    for name, baseline in job.baselines.items():
        check_agreement(name, first(baseline()).detach(), ours, job.agreement)


def check_agreement(name: str, theirs: Tensor, ours: Tensor, agreement: float) -> None:
    """Raise AssertionError if a baseline's result is not the op's, up to a relative difference."""
    if theirs.shape != ours.shape:
        raise AssertionError(f"{name}: shape {tuple(theirs.shape)} is not {tuple(ours.shape)}")
    difference = (theirs.double() - ours.double()).norm()
    error = float(difference / ours.double().norm().clamp(min=1e-30))
    if not error <= agreement:
        raise AssertionError(f"{name}: differs by {error:.2e} > {agreement:.0e}")


OTHER_GRID = 0.3
"""Relative difference allowed to an optional baseline: other packages place their grids otherwise
(max / 7.5, asymmetric), which is still the same work; garbage is not."""


def with_optional(job: Job) -> tuple[Job, dict[str, str]]:
    """The job with the optional baselines that work here, and why the others do not."""
    baselines, reasons = dict(job.baselines), {}
    ours = first(job.call()).detach()
    for name, make in job.optional.items():
        try:
            baseline = make()
            result = first(baseline()).detach()
            if job.agreement is not None:
                check_agreement(name, result, ours, max(job.agreement, OTHER_GRID))
        except Exception as error:  # other people's code: whatever it raises is the reason
            reasons[name] = reason_of(error)
        else:
            baselines[name] = baseline
    return replace(job, baselines=baselines, optional={}), reasons


def reason_of(error: Exception) -> str:
    """One line: ``not installed`` with the missing module, or what a baseline raised."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160].rstrip(": ")


def normal(*size: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Seeded normal numbers, drawn where they are used: a GPU's inputs are large."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device).to(dtype)


def nbytes(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return dtype.itemsize
