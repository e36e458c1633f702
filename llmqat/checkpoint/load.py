"""Reading a model folder, strictly: packed, prepared, or a plain model of transformers.

The folder is inspected first (llmqat.checkpoint.inspection); only then come memory and data. The
model is built from checked numbers on the meta device, and every tensor must arrive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmqat.checkpoint.format import (
    CONFIG,
    FLOATS,
    GENERATION_CONFIG,
    HEAD,
    TORCH_DTYPES,
    decode_linear,
    is_learned_scale,
    linear_shape,
)
from llmqat.checkpoint.inspection import Checkpoint, inspect, with_context
from llmqat.checkpoint.validate import (
    printable,
    read_json,
    regular_file,
)
from llmqat.convert import prepare, swap_empty
from llmqat.errors import CheckpointError, ConfigError
from llmqat.models import compat
from llmqat.models.families import iter_linears
from llmqat.nn.quantized_linear import BUFFERS, held_scales
from llmqat.state import PREPARED


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a model of a known family: converted from a packed folder, prepared from a prepared one,
    plain from any other.

    Args:
        dtype: type of the float tensors that are not quantized (``float32``, ``float16`` or
            ``bfloat16``, of torch or by name); None keeps what is stored.
        device: where the model goes; everything is read and checked on the CPU. `meta` checks the
            folder and gives the model without its weights: every parameter is a shape.

    Returns:
        The family's model in eval mode, e.g. a `LlamaForCausalLM`.

    Raises:
        CheckpointError: one line that names the file and what to do; nothing of the folder is
            executed. ConfigError: a dtype that is not supported, or a device that is not there.
    """
    dtype, device = _float_dtype(dtype), _device(device)
    checkpoint = inspect(directory)
    model = _build(checkpoint, dtype)
    if device.type == "meta":
        compat.tie_head(model)
        _prepare(model, checkpoint)
    else:
        _fill(model, checkpoint, dtype)
        model.to(device)
    _generation_config(model, checkpoint.folder)
    return model


def _float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    for known in (TORCH_DTYPES[name] for name in FLOATS):
        if dtype in (known, str(known).removeprefix("torch.")):
            return known
    raise ConfigError(
        f"dtype: {printable(dtype)} is not supported; use float32, float16 or bfloat16, or None"
    )


def _device(device: torch.device | str) -> torch.device:
    """``device`` if it is there, before anything is read."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device: {printable(device)} is not a device; use cpu, cuda or meta"
        ) from error
    if parsed.type != "cuda":
        return parsed
    from llmqat.runtime.loading import parse_device  # it imports this module

    return parse_device(str(parsed))


def _build(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    arch = checkpoint.arch
    stored = TORCH_DTYPES[checkpoint.tensors[arch.embedding].dtype]
    try:
        model = compat.build_model(arch.family.name, arch.fields, dtype or stored)
    except (
        Exception
    ) as error:  # transformers checks the same numbers in its own way, with its own error classes
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: transformers refuses it: {reason}"
        ) from error
    if checkpoint.packed is not None:
        biases = {
            name.removesuffix(".bias"): dtype or TORCH_DTYPES[info.dtype]
            for name, info in checkpoint.tensors.items()
            if name.endswith(".bias")
        }
        fused = checkpoint.state is not None and checkpoint.state.fused
        where = str(checkpoint.folder / CONFIG)
        with_context(where, partial(swap_empty, fused=fused), model, checkpoint.packed, biases)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    tensors = dict(_read_model(model, checkpoint, dtype))
    learned = {name: tensors.pop(name) for name in list(tensors) if is_learned_scale(name)}
    if checkpoint.arch.tied:
        tensors[HEAD] = tensors[checkpoint.arch.embedding]
    model.load_state_dict(tensors, strict=True, assign=True)
    if checkpoint.arch.tied:
        compat.tie_head(model)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{checkpoint.folder}: no data for {left[0]}; write the checkpoint again"
        )
    _prepare(model, checkpoint)
    # Only a prepared linear has a place for its learned scale.
    model.load_state_dict(learned, strict=False)


def _prepare(model: nn.Module, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    if state is not None and state.stage == PREPARED:
        where = str(checkpoint.folder / CONFIG)
        with_context(where, partial(prepare, fused=state.fused), model, state.config)


def _read_model(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Every entry of the model's state dict, from the files."""
    with ExitStack() as stack:
        readers = {}
        for file in sorted(set(checkpoint.files.values())):
            path = regular_file(checkpoint.folder, file)
            try:
                readers[file] = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{checkpoint.folder / file}: {str(error).splitlines()[0][:120]}"
                ) from error

        def read(name: str) -> Tensor:
            return readers[checkpoint.files[name]].get_tensor(checkpoint.stored[name])

        taken = {HEAD} if checkpoint.arch.tied else set()
        packed = checkpoint.packed
        if packed is not None:
            for name, short, _ in iter_linears(model, checkpoint.arch.family):
                keys = (
                    ("weight_packed", "weight_scale", "weight_shape")
                    if packed.w_bits == 4
                    else ("weight", "weight_scale")
                )
                shape = linear_shape(checkpoint.arch, short, packed)
                codes, scale = decode_linear(
                    {key: read(f"{name}.{key}") for key in keys},
                    shape,
                    f"{checkpoint.folder / checkpoint.files[f'{name}.weight_scale']}: {name}",
                )
                taken.update(f"{name}.{key}" for key in keys)
                buffers = zip(BUFFERS, (codes, *held_scales(scale, packed.weight)), strict=True)
                yield from ((f"{name}.{key}", t) for key, t in buffers if t is not None)
        for name in checkpoint.tensors:
            if name not in taken and not checkpoint.rules[name].implied:
                tensor = read(name)
                kept = dtype is None or is_learned_scale(name)
                yield name, tensor if kept else tensor.to(dtype)


def _generation_config(model: nn.Module, folder: Path) -> None:
    if not os.path.lexists(folder / GENERATION_CONFIG):
        return
    fields = read_json(folder, GENERATION_CONFIG)
    try:
        model.generation_config = compat.generation_config(fields)
    except Exception as error:  # transformers raises several classes for malformed fields
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / GENERATION_CONFIG}: {reason}") from error
