"""One door for every model that is evaluated: full precision, fake-quantized, quantized on the fly
by a post-training method, prepared, packed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmqat.checkpoint.format import TORCH_DTYPES
from llmqat.checkpoint.inspection import inspect
from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError
from llmqat.nn.linear import INPUT_SCALE, QATLinear, clear_weight_cache
from llmqat.ptq.lorc import check_rank, compensate, float_weights
from llmqat.ptq.methods import METHODS, MethodOptions
from llmqat.runtime.loading import StrPath, load_model
from llmqat.state import state_of


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured.

    Attributes:
        model: a transformers ``*ForCausalLM`` in evaluation mode.
        config: its quantization, or None.
        stage: full_precision, prepared, packed, or the method that quantized it here (rtn, ...).
        calibration: what a method looked at, as JSON values, or None.
    """

    model: Any
    config: QATConfig | None
    stage: str
    calibration: dict[str, Any] | None = None


def load_for_evaluation(
    folder: StrPath,
    config: QATConfig | None = None,
    *,
    method: str | None = None,
    options: MethodOptions | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> LoadedModel:
    """Load a model, and quantize it as asked.

    Args:
        folder: a full-precision, prepared or packed model.
        config: fake-quantizes a full-precision model (round to nearest); a prepared or packed one
            must have the same settings, or None to take it as it is.
        method: of `METHODS`, applied to a full-precision model: the numbers are those of the
            checkpoint that `llmqat quantize` writes with the same options. Where a setting has no
            packed form, methods that only round (rtn, smoothquant) leave the model prepared.
        options: what the method is told.
        dtype: of all that is not quantized. A method computes in float32 whatever this is.
        device: CPU by default.

    Raises:
        ConfigError: `config` or `method` contradicts the checkpoint or each other.
        CheckpointError, DataError: unreadable model or calibration text.
    """
    device = device or torch.device("cpu")
    if method is not None:
        return _quantized(folder, config, method, options or MethodOptions(), dtype, device)
    model = load_model(folder, dtype=dtype, device=device)
    state = state_of(model)
    if state is None:
        if config is None:
            return LoadedModel(model, None, "full_precision")
        prepare(model, config)
        return LoadedModel(model.eval(), config, "rtn")
    if config is not None and config != state.config:
        raise ConfigError(
            f"--bits: {folder} is {state.stage} as {state.config.setting} ({state.config.kv_mode}),"
            " with other settings; leave the quantization options out"
        )
    return LoadedModel(model, state.config, state.stage)


def _quantized(
    folder: StrPath,
    config: QATConfig | None,
    method: str,
    options: MethodOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> LoadedModel:
    if config is None:
        raise ConfigError(f"--bits: not given; --method {method} needs e.g. --bits 4-8-8")
    options.check_options(method)
    keywords = options.method_options(method)
    rank = keywords.pop("rank", None)
    unpacked = METHODS[method].unpacked
    if rank is not None or unpacked is None or _packable(config):
        config.check_packable()
        unpacked = None
    checkpoint = inspect(folder)
    stored = TORCH_DTYPES[checkpoint.tensors[checkpoint.arch.embedding].dtype]
    model = load_model(folder, dtype=torch.float32, device=device)
    state = state_of(model)
    if state is not None:
        raise ConfigError(
            f"--method: {folder} is {state.stage} as {state.config.setting} already; leave it out"
        )
    if rank is not None:
        check_rank(model, rank)
    weights = {} if rank is None else float_weights(model)
    tokens = options.tokens(model, folder)
    run, calibration = unpacked or METHODS[method].run, None
    if tokens is None:
        run(model, config, **keywords)
    else:
        run(model, config, tokens, progress=True, **keywords)
        calibration = {
            "paths": options.calibration,
            "sequences": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "seed": options.seed or 0,
            "sha256": hashlib.sha256(tokens.cpu().contiguous().numpy().data).hexdigest(),
        }
    if rank is not None:
        compensate(model, weights, rank)
    _cast_as_stored(model, stored, dtype)
    return LoadedModel(model.eval(), config, method, calibration)


def _packable(config: QATConfig) -> bool:
    try:
        config.check_packable()
    except ConfigError:
        return False
    return True


def _cast_as_stored(model: nn.Module, stored: torch.dtype, dtype: torch.dtype) -> None:
    """As the checkpoint would be: norms that a method has changed are rounded to the stored type.

    Parameters only: a model-wide cast would round the rotary frequencies. Weights that are still to
    be quantized, and learned scales, stay as they are: they decide the codes.
    """
    kept = set()
    for module in model.modules():
        if isinstance(module, QATLinear):
            own = dict(module.named_parameters(recurse=False))
            names = ["weight", INPUT_SCALE] if module.spec.weight.enabled else [INPUT_SCALE]
            kept |= {id(own[name]) for name in names if name in own}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(stored).to(dtype)
    clear_weight_cache(model)
