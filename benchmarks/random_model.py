"""Models of released sizes with random weights, made where they run and in the form that is needed.

A packed 7B model has 3.5 GB of codes; made from floats it would pass through 13.5 GB that nobody
reads. Speed does not depend on the values, as long as they are not all alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat import QATConfig
from llmqat.convert import swap_empty
from llmqat.models import compat
from llmqat.models.shapes import find_shape
from llmqat.nn.quantized_linear import QuantizedLinear

STD = 0.02
"""Standard deviation of the weights, as transformers initializes them."""
CODE_STD = {4: 4.32, 8: 73.3}
"""Of codes drawn evenly from the grid."""


def config_of(name: str, layers: int | None = None) -> Any:
    """The configuration of a LLaMA by name, or ``tiny``; with fewer layers if asked."""
    if name == "tiny":
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    else:
        config = find_shape(name).config()
    config.use_cache = True
    # No token ends a sequence: every candidate makes as many as it is asked for.
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def _empty(config: Any) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def _fill(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """Random floats for every parameter without data, ones for the norms."""
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            data = torch.empty(value.shape, dtype=dtype, device=device)
            if value.dim() == 1:
                data.fill_(1.0)
            else:
                data.normal_(0.0, STD, generator=generator)
            setattr(module, name, nn.Parameter(data, requires_grad=False))
    compat.restore_rotary(model)
    return model


def float_model(
    config: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """A plain model on ``device``."""
    return _fill(_empty(config), device, dtype, seed)


def packed_model(
    config: Any,
    setting: str,
    kv_mode: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> nn.Module:
    """A converted model on ``device`` whose codes were drawn, not computed.

    Args:
        setting: ``4-8-8``: bits of weights, activations and the KV cache.
    """
    model = _empty(config)
    swap_empty(model, QATConfig.parse(setting, kv_mode=kv_mode), {})
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            bits = module.spec.weight.bits
            module.weight_codes = _codes(module.weight_codes, bits, generator)
            shape = module.weight_scale.shape
            module.weight_scale = torch.full(shape, STD / CODE_STD[bits], device=device)
    return _fill(model, device, dtype, seed)


def _codes(like: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Random codes of the grid in the shape and storage of ``like``."""
    size, device = like.shape, generator.device
    codes = torch.empty(size, dtype=like.dtype, device=device)
    if bits == 8:
        return codes.random_(-127, 128, generator=generator)
    codes.random_(0, 225, generator=generator)  # two digits of base 15: a code has 15 values
    low, high = codes % 15 + 1, codes.div(15, rounding_mode="floor") + 1
    return low.bitwise_xor_(8) | (high.bitwise_xor_(8) << 4)


def decode_bytes(
    config: Any, w_bits: int, kv_bits: int, batch: int, context: float, kv_mode: str = "paper"
) -> float:
    """Least bytes of one decode step: linears, norms and head once, the cache of every sequence.

    Args:
        context: tokens that each sequence attends to, on average.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    dim = hidden // config.num_attention_heads
    kv_width = config.num_key_value_heads * dim
    rows = hidden + 2 * kv_width + hidden + 2 * inner + hidden
    weights = hidden * (hidden + 2 * kv_width + hidden + 3 * inner)
    linears = weights * w_bits / 8 + (4 * rows if w_bits < 16 else 0)
    norms = 2 * hidden * 2
    scales = 0 if kv_bits == 16 else 8 * (1 if kv_mode == "paper" else config.num_key_value_heads)
    cache = batch * context * (2 * kv_width * kv_bits / 8 + scales)
    head = 2 * hidden * (config.vocab_size + 1)
    return float(config.num_hidden_layers * (linears + norms + cache) + head)


def decode_bound(bandwidth: float, batch: int, step_bytes: float) -> float:
    """Tokens a second that no implementation exceeds where memory is the limit."""
    return batch * bandwidth / step_bytes
