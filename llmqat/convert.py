"""prepare and convert: the only place that swaps modules.

    plain model --prepare(config)--> prepared (trains through quantization) --convert--> packed
    (holds codes)

Both change the model in place and return it; both check everything first, so that an error leaves
the model as it was. The model gets a config object of its own, whose `llmqat` entry records stage
and settings for every writer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import NoReturn

import torch
from torch import nn

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat.models.families import Family, find_family, iter_blocks, iter_linears
from llmqat.nn.attention import KVQuantizer, TokenKVQuantizer, enable_kv_quantization
from llmqat.nn.conv1d import adopt_linear, row_weight
from llmqat.nn.fused import check_fusable, fuse_blocks
from llmqat.nn.linear import LinearSpec, QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.report import conversion_report
from llmqat.state import PACKED, PREPARED, STATE_ATTRIBUTE, State, state_of
from llmqat_kernels.checks import MAX_INTEGER_GROUP_K

__all__ = ["conversion_report", "convert", "prepare", "state_of", "swap_empty"]


def prepare(model: nn.Module, config: QATConfig, *, fused: bool = False) -> nn.Module:
    """Make a transformers model of a known family train through quantization, in place.

    All linears of every block quantize weight and input, K and V are quantized as
    `config.kv_mode` says; embeddings, norms, Q, softmax and the head stay as they are (LLM-QAT
    section 2.2). Parameters and their names are unchanged.

    Args:
        fused: let norms, rotary embedding and SwiGLU write the codes that the linears read (needs
            w_bits and a_bits of at most 8): faster, leaner, and in every norm and activation the
            engine's own bits. The same weights give slightly other numbers than without, so the
            choice is recorded and kept by convert and checkpoints.

    Raises:
        ConfigError: an unsupported model, one that is prepared already, or a layer that cannot be
            quantized or fused.
    """
    if not isinstance(config, QATConfig):
        raise ConfigError(
            f"config: expected a QATConfig, got {type(config).__name__}; use"
            " QATConfig.parse('4-8-4')"
        )
    family = find_family(model)
    _refuse_changed(model)
    linears = list(iter_linears(model, family))
    for name, _, module in linears:
        _check_linear(name, module, family, config)
    if fused:
        check_fusable(model, family, config)
    compat.own_config(model)
    compat.restore_rotary(model)
    for _, short, module in linears:
        spec = _linear_spec(short, family, config, fused)
        if spec.enabled:
            adopt_linear(module, spec)
    _connect(model, family, config, fused)
    _set_state(model, State(PREPARED, config, fused))
    return model


def convert(model: nn.Module, config: QATConfig | None = None) -> nn.Module:
    """Replace every prepared linear by its packed form, in place; codes and scales are those of the
    last forward.

    With `config`, a plain model is prepared first: round-to-nearest quantization without training.
    Fused blocks stay fused.

    Raises:
        ConfigError: not prepared and no `config`; converted already; `config` differs from the
            prepared one; a setting without packed form (w_bits 16 or 32, kv_bits other than 4, 8,
            16, 32); non-finite weights.
    """
    state = state_of(model)
    if state is None:
        if config is None:
            raise ConfigError(
                "model: not prepared; call prepare(model, config) first, or convert(model, config)"
            )
        config.check_packable()
        find_family(model)
    elif state.stage == PACKED:
        raise ConfigError("model: already converted; save it with save_pretrained(model, dir)")
    elif config is not None and config != state.config:
        raise ConfigError(
            f"config: the model was prepared as {state.config.setting} with other settings; omit"
            " config"
        )
    else:
        config = state.config
        config.check_packable()
    family = find_family(model)
    for name, _, module in iter_linears(model, family):
        if not bool(torch.isfinite(module.weight).all()):
            raise ConfigError(
                f"{name}: weight has NaN or infinite values; such a layer cannot be converted"
            )
    if state is None:
        prepare(model, config)
    for name, _, module in list(iter_linears(model, family)):
        if not isinstance(module, QATLinear):
            raise ConfigError(
                f"{name}: expected a QATLinear, found {type(module).__name__}; prepare a fresh"
                " model"
            )
        model.set_submodule(name, QuantizedLinear.from_qat(module))
    _set_state(model, State(PACKED, config, state is not None and state.fused))
    model.save_pretrained = _refuse_plain_save
    return model


def swap_empty(
    model: nn.Module,
    config: QATConfig,
    bias_dtypes: Mapping[str, torch.dtype],
    *,
    fused: bool = False,
) -> None:
    """For loaders: make a meta model a converted one whose linears have buffers without data.

    Args:
        bias_dtypes: dtype of the bias of every linear that has one, by the linear's full name.
    """
    config.check_packable()
    family = find_family(model)
    if fused:
        check_fusable(model, family, config)
    compat.own_config(model)
    with torch.device("meta"):
        for name, short, module in list(iter_linears(model, family)):
            _check_linear(name, module, family, config)
            spec = _linear_spec(short, family, config, fused)
            n, k = row_weight(module).shape
            linear = QuantizedLinear.empty(k, n, spec, bias_dtype=bias_dtypes.get(name))
            model.set_submodule(name, linear.train(module.training))
    _connect(model, family, config, fused)
    _set_state(model, State(PACKED, config, fused))
    model.save_pretrained = _refuse_plain_save


def _refuse_changed(model: nn.Module) -> None:
    state = state_of(model)
    if state is not None:
        raise ConfigError(
            f"model: already {state.stage} ({state.config.setting}); prepare a fresh model"
        )


def _check_linear(name: str, module: nn.Module, family: Family, config: QATConfig) -> None:
    if not family.is_linear(module):
        raise ConfigError(
            f"{name}: expected a plain nn.{family.linear_class}, found {type(module).__name__}; it"
            " would be skipped"
        )
    columns = row_weight(module).shape[1]
    for field, part in (("group_size", config.weight), ("a_group_size", config.activation)):
        group = part.group_size
        if part.enabled and group != -1 and columns % group:
            raise ConfigError(
                f"{field}: {group} does not divide the {columns} input columns of {name}"
            )
    if config.weight.integer_scales and columns > MAX_INTEGER_GROUP_K:
        raise ConfigError(
            f"weight_scale_dtype: the {columns} input columns of {name} exceed"
            f" {MAX_INTEGER_GROUP_K}, the longest exact sum with integer scales; use bfloat16"
        )


def _linear_spec(short: str, family: Family, config: QATConfig, fused: bool) -> LinearSpec:
    # In fused blocks the rotary embedding quantizes K and V, in either mode.
    return LinearSpec.from_config(config, is_kv=short in family.kv_linears and not fused)


def _connect(model: nn.Module, family: Family, config: QATConfig, fused: bool) -> None:
    """What lies between the quantized linears: fused blocks, or quantized K and V in attention."""
    if fused:
        fuse_blocks(model, family, config)
    elif config.kv.enabled and (config.kv_mode == "serving" or not family.kv_linears):
        attentions = [
            block.get_submodule(family.attention) for _, block in iter_blocks(model, family)
        ]
        kind = KVQuantizer if config.kv_mode == "serving" else TokenKVQuantizer
        enable_kv_quantization(model, attentions, kind(config.kv, config.ste_clip))


def _set_state(model: nn.Module, state: State) -> None:
    setattr(model, STATE_ATTRIBUTE, state)
    model.config.llmqat = state.to_dict()


def _refuse_plain_save(*_: object, **__: object) -> NoReturn:
    # transformers would write tensors that any process without this package loads as random
    # weights.
    raise ConfigError("model: a converted model is saved with llmqat.save_pretrained(model, dir)")


class _CallableModule(ModuleType):
    """`llmqat.convert` names this module and, in the package, its main function: both can be
    called.
    """

    def __call__(self, model: nn.Module, config: QATConfig | None = None) -> nn.Module:
        return convert(model, config)


# Importing this module binds it to `llmqat.convert`, over the function of that name.
sys.modules[__name__].__class__ = _CallableModule
