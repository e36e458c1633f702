"""What is in a checkpoint: names, shapes and types of all tensors, and one packed linear.

The layout is that of compressed-tensors (docs/packed-format.md), filled with our codes and scales,
bit for bit. Pure functions: nothing here opens a file or knows a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmqat.checkpoint.architecture import Architecture
from llmqat.checkpoint.validate import TensorInfo
from llmqat.config import QATConfig
from llmqat.errors import CheckpointError
from llmqat.nn.linear import INPUT_SCALE
from llmqat_kernels.spec.quantize import are_integer_scales, qmax

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "llmqat_manifest.json"
MANIFEST_VERSION = 1
HEAD = "lm_head.weight"

FLOATS = ("F32", "F16", "BF16")
TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}
PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
_CODES_PER_WORD = 8


@dataclass(frozen=True)
class TensorRule:
    """The shape and the accepted types of one tensor of a checkpoint. An `implied` one is what the
    config says anyway: older writers stored it, it is never read.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False
    implied: bool = False


@dataclass(frozen=True)
class LinearShape:
    """One packed linear: y[N] = x[K]; G scales a row (1 per row without groups)."""

    n: int
    k: int
    bits: int
    group_size: int
    integer_scales: bool = False

    @property
    def groups(self) -> int:
        """Scales per row."""
        return 1 if self.group_size == -1 else self.k // self.group_size

    @property
    def packed(self) -> bool:
        """Whether codes are packed, eight 4-bit codes a word."""
        return self.bits == 4


def quantization_config(config: QATConfig) -> dict[str, Any]:
    """The `quantization_config` of config.json: `config` in compressed-tensors' words."""
    container = PACK_QUANTIZED if config.w_bits == 4 else INT_QUANTIZED
    grouped = config.group_size != -1
    weights = {
        "num_bits": config.w_bits,
        "type": "int",
        "symmetric": True,
        "group_size": config.group_size if grouped else None,
        "strategy": "group" if grouped else "channel",
        "dynamic": False,
    }
    inputs = {
        "num_bits": config.a_bits,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": "token",
        "dynamic": True,
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if config.activation.enabled else None,
        "output_activations": None,
        "format": container,  # without it readers infer int8 storage for W4A8
    }
    return {
        "config_groups": {"group_0": scheme},
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": None,
        "format": container,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
    }


def is_learned_scale(name: str) -> bool:
    """Whether the tensor of this name is a learned scale (spec 22), which is fp32 in any model."""
    return name.endswith(f".{INPUT_SCALE}")


def linear_shape(arch: Architecture, name: str, config: QATConfig) -> LinearShape:
    """The packed form of a block's linear; CheckpointError where the group size does not fit."""
    n, k = arch.linear_shape(name)
    if config.group_size != -1 and k % config.group_size:
        raise CheckpointError(
            f"llmqat.group_size: {config.group_size} does not divide the {k} columns of {name}"
        )
    return LinearShape(n, k, config.w_bits, config.group_size, config.weight.integer_scales)


def expected_tensors(
    arch: Architecture, packed: QATConfig | None, prepared: QATConfig | None = None
) -> dict[str, TensorRule]:
    """Every tensor of a checkpoint: of a packed one, or (None) of one with float weights, with
    the learned scales of a `prepared` one.
    """
    family = arch.family
    rules = {arch.embedding: TensorRule((arch.vocab, arch.hidden)), **_norm(arch, family.norm)}
    if family.positions is not None:
        rules[f"{family.positions}.weight"] = TensorRule((arch.positions, arch.hidden))
    # Plain writers may repeat a tied head; a packed checkpoint of ours never does.
    if not arch.tied or packed is None:
        rules[HEAD] = TensorRule((arch.vocab, arch.hidden), optional=arch.tied)
    for index in range(arch.layers):
        block = f"{family.blocks}.{index}"
        for name in family.norms:
            rules.update(_norm(arch, f"{block}.{name}"))
        for name in family.head_norms:
            rules[f"{block}.{name}.weight"] = TensorRule((arch.head_dim,))
        if packed is None:
            rules.update(_implied(arch, f"{block}.{family.attention}"))
        for name in family.linears:
            prefix = f"{block}.{name}"
            if packed is None:
                rules[f"{prefix}.weight"] = TensorRule(arch.weight_shape(name))
            else:
                shape = linear_shape(arch, name, packed)
                rules.update(
                    {f"{prefix}.{key}": rule for key, rule in _packed_rules(shape).items()}
                )
            if prepared is not None and prepared.a_quantizer == "lsq":
                rules[f"{prefix}.{INPUT_SCALE}"] = TensorRule((1,), ("F32",))
            if arch.has_bias(name):
                rules[f"{prefix}.bias"] = TensorRule(arch.linear_shape(name)[:1])
    return rules


def _norm(arch: Architecture, name: str) -> dict[str, TensorRule]:
    parts = ("weight", "bias") if arch.family.norm_bias else ("weight",)
    return {f"{name}.{part}": TensorRule((arch.hidden,)) for part in parts}


def _implied(arch: Architecture, attention: str) -> dict[str, TensorRule]:
    """Tables that conversions of LLaMA 1 and 2, and those of GPT-2, stored in every block."""
    if arch.family.positions is None:
        shape = (arch.head_dim // 2,)
        return {f"{attention}.rotary_emb.inv_freq": TensorRule(shape, optional=True, implied=True)}
    mask = TensorRule(
        (1, 1, arch.positions, arch.positions), (*FLOATS, "BOOL", "U8"), optional=True, implied=True
    )
    return {
        f"{attention}.bias": mask,
        f"{attention}.masked_bias": TensorRule((), optional=True, implied=True),
    }


def _packed_rules(shape: LinearShape) -> dict[str, TensorRule]:
    scale = TensorRule((shape.n, shape.groups), ("BF16", "F32"))
    if not shape.packed:
        return {"weight": TensorRule((shape.n, shape.k), ("I8",)), "weight_scale": scale}
    words = -(-shape.k // _CODES_PER_WORD)
    return {
        "weight_packed": TensorRule((shape.n, words), ("I32",)),
        "weight_scale": scale,
        "weight_shape": TensorRule((2,), ("I64",)),
    }


def check_tensors(
    found: Mapping[str, TensorInfo], rules: Mapping[str, TensorRule], where: str
) -> None:
    """Raise CheckpointError unless names, shapes and types are exactly the expected ones."""
    for name in sorted(found.keys() - rules.keys()):
        raise CheckpointError(
            f"{where}: unexpected tensor {name}; config.json does not describe these weights"
        )
    for name, rule in rules.items():
        info = found.get(name)
        if info is None:
            if rule.optional:
                continue
            raise CheckpointError(f"{where}: tensor {name} is missing; write the checkpoint again")
        if info.shape != rule.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {info.shape}, config.json implies {rule.shape}"
            )
        if info.dtype not in rule.dtypes:
            raise CheckpointError(
                f"{where}: {name} is {info.dtype}, expected {' or '.join(rule.dtypes)}"
            )


def encode_linear(codes: Tensor, scale: Tensor, shape: LinearShape) -> dict[str, Tensor]:
    """Tensors on disk of one linear.

    Args:
        codes: int8 [N, K], or for 4 bits uint8 [N, ceil(K / 2)] as `pack_int4` gives (spec 8).
        scale: fp32 [N] or [N, G]; stored as bf16 where that loses nothing, else as fp32.
    """
    column = scale.reshape(shape.n, shape.groups)
    half = column.to(torch.bfloat16)
    stored = half if torch.equal(half.to(torch.float32), column) else column
    if not shape.packed:
        return {"weight": codes.contiguous(), "weight_scale": stored.contiguous()}
    # A word holds eight values + 8, the first in the low bits. For a two's complement nibble `+ 8`
    # is `^ 8`.
    row = codes ^ 0x88
    if shape.k % 2:
        row[:, -1] &= 0x0F
    padding = -row.shape[1] % 4
    words = torch.nn.functional.pad(row, (0, padding)).contiguous().view(torch.int32)
    size = torch.tensor([shape.n, shape.k], dtype=torch.int64)
    return {"weight_packed": words, "weight_scale": stored.contiguous(), "weight_shape": size}


def decode_linear(
    tensors: Mapping[str, Tensor], shape: LinearShape, where: str
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`encode_linear`: codes as stored in memory, scale fp32 [N] or [N, G].

    Raises:
        CheckpointError: a code outside [-qmax, qmax], a scale that is not finite and positive (or
            not an integer one), a wrong `weight_shape`, or padding that is not zero.
    """
    scale = tensors["weight_scale"].to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(
            f"{where}.weight_scale: a scale is not finite and positive; write the checkpoint again"
        )
    if shape.integer_scales and not are_integer_scales(scale):
        raise CheckpointError(
            f"{where}.weight_scale: not whole multiples of one bfloat16 number a row, the largest"
            " 63, as weight_scale_dtype 'integer' says; write the checkpoint again"
        )
    if shape.group_size == -1:
        scale = scale.squeeze(-1)
    codes = _decode_words(tensors, shape, where) if shape.packed else tensors["weight"]
    if not shape.packed:
        limit = qmax(shape.bits)
        if codes.numel() and (int(codes.min()) < -limit or int(codes.max()) > limit):
            raise CheckpointError(
                f"{where}.weight: a code is outside [-{limit}, {limit}]; write the checkpoint again"
            )
    return codes, scale


def _decode_words(tensors: Mapping[str, Tensor], shape: LinearShape, where: str) -> Tensor:
    if tensors["weight_shape"].tolist() != [shape.n, shape.k]:
        raise CheckpointError(
            f"{where}.weight_shape: is not [{shape.n}, {shape.k}] as config.json implies"
        )
    row = tensors["weight_packed"].contiguous().view(torch.uint8)
    columns = (shape.k + 1) // 2
    last = row[:, shape.k // 2 :] if shape.k % 2 else row[:, columns:]
    padding = last.clone()
    if shape.k % 2:
        padding[:, 0] &= 0xF0
    if bool(padding.any()):
        raise CheckpointError(f"{where}.weight_packed: padding after column {shape.k} is not zero")
    row = row[:, :columns]
    low_empty, high_empty = (row & 0x0F) == 0, (row & 0xF0) == 0
    if shape.k % 2:
        high_empty[:, -1] = False
    if bool(low_empty.any()) or bool(high_empty.any()):
        raise CheckpointError(
            f"{where}.weight_packed: code -8 occurs, codes are -7..7; re-quantize the weights"
        )
    codes = row ^ 0x88
    if shape.k % 2:
        codes[:, -1] &= 0x0F
    return codes
