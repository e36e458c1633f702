"""Tensors that say ``cuda:0`` and are computed on the CPU.

What a device refuses is refused: operands on two devices, a copy to or from unpinned host memory
and a value read by the host while a graph is captured. Operators of this package run the kernels
that they would run on CUDA: Triton's in the interpreter, and in the place of each CUDA C++ one
(``tests/emulator`` runs those) the reference.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from llmqat_kernels import dispatch, use_backend
from llmqat_kernels.schemas import SCHEMAS
from tests.llmqat.host_syncs import VALUE_DEPENDENT
from tests.twin import launches
from tests.twin.graphs import TAPE

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ACROSS = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::_unsafe_index", "aten::index_put_",
          "aten::_index_put_impl_")  # fmt: skip
"""Operators that take operands of both devices (indices may lie on the CPU)."""
FIRST_DECIDES = ("aten::index", "aten::_unsafe_index", "aten::copy_")
"""Their result is where the first operand is."""
RAN: set[str] = set()
"""Operators of the native library that ran on the device, and what a flow's place adds;
``launches.LAUNCHED`` has every launch."""


class Twin(torch.Tensor):
    """A tensor of the device; ``inner`` holds its numbers."""

    is_cuda, is_cpu = True, False

    @staticmethod
    def __new__(cls, inner):
        twin = torch.Tensor._make_subclass(
            cls, inner, False, dispatch_device=True, device_for_backend_keys=CUDA
        )
        twin.inner = inner
        return twin

    def __repr__(self):
        return f"Twin({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def inner(value):
    """A CPU tensor for a twin, the CPU for the device; other values as they are."""
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return value.inner if isinstance(value, Twin) else value


def run(op, args, kwargs):
    """One operator of torch or of this package."""
    if op is torch.ops.prim.device.default:
        return CUDA
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    twins = {id(x.inner): x for x in tensors if isinstance(x, Twin)}
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if twins:
        _check(op, asked, [x for x in tensors if not isinstance(x, Twin)])
        if _name(op).partition("::")[2] in SCHEMAS:
            return _own(op, args, kwargs, twins)
    function = _out_dtype_mm if op is torch.ops.aten.mm.dtype else op
    there = {key: inner(value) for key, value in kwargs.items() if key != "pin_memory"}
    if asked == "cuda":
        there["device"] = CPU
    on_device = bool(twins) if asked is None else asked == "cuda"
    if _name(op) in FIRST_DECIDES:
        on_device = isinstance(args[0], Twin)
    if not on_device:
        return function(*tree_map(inner, args), **there)
    launches.LAUNCHED.extend(launches.torch_operator(op))
    result = _wrap(TAPE.run(function, tree_map(inner, args), there), twins)
    return return_and_correct_aliasing(op, args, kwargs, result) if twins else result


def _name(op):
    """Without the overload."""
    return op.name().partition(".")[0]


def _check(op, asked, on_cpu):
    """RuntimeError for operands that a device would refuse.

    Args:
        asked: the device that the call names, if any.
        on_cpu: its operands that are not on the device; torch takes numbers, as tensors of no
            dimension.
    """
    ours = op.namespace.startswith("llmqat")
    if _name(op) not in ACROSS and any(x.dim() or ours for x in on_cpu):
        shapes = [tuple(x.shape) for x in on_cpu]
        raise RuntimeError(f"{op.name()}: tensors on cuda:0 and, with shapes {shapes}, on the CPU")
    if TAPE.recording and (asked == "cpu" or on_cpu or VALUE_DEPENDENT & {op.name(), _name(op)}):
        raise RuntimeError(f"{op.name()}: not permitted while a graph is captured")


def _wrap(result, twins):
    return tree_map_only(
        torch.Tensor, lambda x: twins[id(x)] if id(x) in twins else Twin(x), result
    )


def _own(op, args, kwargs, twins):
    """An operator of this package: by the table of backends, or a CUDA C++ kernel's stand-in."""
    name = op.name().partition("::")[2]
    rest = op._schema.arguments[len(args) :]
    args = (*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest))
    if op.namespace == "llmqat":
        choice = dispatch.resolve(name, "cuda", dispatch.current_backend())
        with device():
            return choice.kernel(*args)
    RAN.add(op.name())
    _check_as_the_library(op, args)
    launches.LAUNCHED.extend(launches.native(name, args))

    def stand_in(*args):
        with use_backend("reference"):
            return dispatch.resolve(name, "cpu", "reference").kernel(*args)

    return _wrap(TAPE.run(stand_in, tree_map(inner, args), {}), twins)


def _check_as_the_library(op, args):
    """RuntimeError for settings that the reference takes and csrc/bindings refuses on CUDA."""
    name = op.name().partition("::")[2]
    given = {
        argument.name: value for argument, value in zip(op._schema.arguments, args, strict=True)
    }
    if not name.startswith(("quantized_", "repacked_")):
        return
    if given["group_size"] != -1:
        raise RuntimeError(f"{name}: group_size: the cuda kernels take one scale a channel (-1)")
    is_float = name.startswith("repacked_linear") or given.get("a_bits", 8) > 8
    if is_float and (given["x"].dtype == torch.float32 or given["w_bits"] > 4):
        raise RuntimeError(f"{name}: x: no cuda kernel for these float activations")


def _out_dtype_mm(a, b, dtype):
    """``torch.mm(..., out_dtype=)``, which torch has for CUDA alone."""
    return a.to(dtype) @ b.to(dtype)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch decides before an operator is called: the device's index, data from Python."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {key: _indexed(value) for key, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return function(*(_indexed(value) for value in args), **kwargs)


def _indexed(value):
    if isinstance(value, str) and value == "cuda":
        return CUDA
    bare = isinstance(value, torch.device) and value.type == "cuda" and value.index is None
    return CUDA if bare else value


@contextmanager
def device():
    """Within it, tensors can be made on ``cuda``."""
    with _Functions(), _Operators():
        yield
