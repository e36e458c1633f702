"""A model's weights in the form the engine runs them: linears that share an input are one matrix.

Plain, prepared and converted models give the same structure. The rows of q, k, v (and of gate, up)
are stacked: a row of a linear does not know its neighbours, so the fused product equals the
separate ones bit for bit (spec 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import llmqat_kernels as qk
from llmqat.config import QATConfig, QuantSpec
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_blocks
from llmqat.nn.linear import QATLinear
from llmqat.nn.quantized_linear import QuantizedLinear
from llmqat.runtime.screen import HeadScreen, make_screen
from llmqat.runtime.support import check_runnable
from llmqat.state import state_of
from llmqat_kernels.dispatch import resolve
from llmqat_kernels.nn import QuantizedWeight

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""RoPE variants whose tables depend on the length of the sequence: one table per model cannot serve
them.
"""
OFF = QuantSpec(16)


@dataclass(frozen=True)
class FusedLinear:
    """One or several linears with the same input, [n, K], in the backend's layout
    (``repack_weight``).

    ``scale`` fp32 [n] or [n, groups] belongs to codes; None marks a float weight (w_bits 16). With
    ``multiplier`` uint8 [n, groups] it is [n] (spec 18), and the layout is what the backend's
    ``integer_group_matmul`` reads. ``a_bits`` 16 means that the input is not quantized; such a
    linear is a float product (spec 17), also where its weight is codes.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    n: int
    w_bits: int
    a_bits: int
    group_size: int
    multiplier: Tensor | None = None

    @property
    def held(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, scale and bias, as operators on repacked weights take them."""
        return self.weight, self.scale, self.bias

    @property
    def form(self) -> tuple[int, int, int]:
        """n, w_bits and group_size, likewise."""
        return self.n, self.w_bits, self.group_size

    @property
    def integer(self) -> bool:
        """Whether the product is the integer formula of spec 7 or 18."""
        return self.scale is not None and self.a_bits < 16

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias as held."""
        held = (self.weight, self.scale, self.multiplier, self.bias)
        return sum(t.nbytes for t in held if t is not None)


@dataclass(frozen=True)
class Block:
    """One decoder block; `head_norms` are the weights [D] of the norms of Q and K heads (Qwen3)."""

    input_norm: Tensor
    input_eps: float
    qkv: FusedLinear
    o: FusedLinear
    post_norm: Tensor
    post_eps: float
    gate_up: FusedLinear
    down: FusedLinear
    head_norms: tuple[Tensor, Tensor] | None = None
    head_eps: float = 0.0

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        """The four fused linears, in the order they run."""
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[Tensor, ...]:
        """Weights of its norms."""
        return (self.input_norm, self.post_norm, *(self.head_norms or ()))

    @property
    def integer_bits(self) -> int | None:
        """The activation width if every linear is an integer product of that width, else None."""
        widths = {linear.a_bits if linear.integer else None for linear in self.linears}
        return widths.pop() if len(widths) == 1 else None


@dataclass(frozen=True)
class ModelWeights:
    """Everything a forward pass reads except the KV cache. ``cos``, ``sin`` fp32 [T, D / 2];
    embedding [V, H].
    """

    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Tensor
    norm_eps: float
    head: FusedLinear
    head_screen: HeadScreen | None
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    quantization: QATConfig

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind. A tied embedding that the head holds in another layout is counted in both
        places.
        """
        linears = sum(linear.nbytes for block in self.blocks for linear in block.linears)
        norms = sum(norm.nbytes for block in self.blocks for norm in block.norms) + self.norm.nbytes
        screen = self.head_screen
        sizes = {
            "linears": linears,
            "head": self.head.nbytes,
            "embedding": self.embedding.nbytes,
            "norms": norms,
        }
        return sizes if screen is None else sizes | {"head screen": screen.nbytes}


def narrow(weight: Tensor) -> Tensor:
    """``weight`` as bf16 where that changes no value (a checkpoint stored in bf16), else as it is.

    The float product widens the weight to fp32 (spec 17), so a lossless narrowing halves the bytes
    a step reads and leaves its result alone.
    """
    if weight.dtype != torch.float32:
        return weight
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(torch.float32), weight) else weight


@dataclass(frozen=True)
class _Source:
    """One linear as the model holds it: codes with scales, or a float weight."""

    quantized: QuantizedWeight | None
    weight: Tensor | None
    bias: Tensor | None
    w_spec: QuantSpec
    a_bits: int


def multiplies_codes(device: torch.device, weight: QuantSpec, dtype: torch.dtype) -> bool:
    """Whether the backend in use has a kernel (``repacked_linear``) for activations of ``dtype``
    times this weight's codes as they are kept. Elsewhere the engine dequantizes the weight once: to
    do so in every step would cost more than to read the floats.
    """
    backend = resolve("repacked_linear", device.type, qk.current_backend()).backend
    if backend == "cuda":
        per_channel = weight.group_size == -1
        return weight.bits <= 4 and per_channel and dtype in (torch.bfloat16, torch.float16)
    return backend == "cpu"


def _read(module: nn.Module, dtype: torch.dtype) -> _Source:
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    if isinstance(module, QuantizedLinear | QATLinear):
        weight, a_bits = module.spec.weight, min(module.spec.activation.bits, 16)
        device = (module.weight if isinstance(module, QATLinear) else module.weight_codes).device
        if weight.enabled and (a_bits != 16 or multiplies_codes(device, weight, dtype)):
            return _Source(module.quantized_weight(), None, bias, weight, a_bits)
        if isinstance(module, QuantizedLinear):
            return _Source(None, module.dequantize(dtype), bias, OFF, a_bits)
        value = module.weight.detach()
        if weight.enabled:
            value = qk.fake_quantize(
                value,
                weight.bits,
                group_size=weight.group_size,
                scale_dtype=module.spec.scale_dtype,
            )
        return _Source(None, value.to(dtype), bias, OFF, a_bits)
    if type(module) is not nn.Linear:
        raise ConfigError(
            f"model: the engine cannot run a {type(module).__name__}; pass a plain model"
        )
    return _Source(None, module.weight.detach(), bias, OFF, 16)


def _stored(weight: Tensor, weight_dtype: torch.dtype | None) -> Tensor:
    """A float weight as the engine keeps it."""
    return narrow(weight) if weight_dtype is None else weight.to(weight_dtype)


def _float_linear(
    weight: Tensor, bias: Tensor | None, a_bits: int, weight_dtype: torch.dtype | None
) -> FusedLinear:
    stored = _stored(weight, weight_dtype)
    if stored.dtype == torch.float16:  # no layout of its own; every fp16 value is an fp32 value
        stored = stored.to(torch.float32)
    layout = qk.repack_weight(stored.contiguous(), 16)
    return FusedLinear(layout, None, bias, weight.shape[0], 16, a_bits, -1)


def fuse(
    modules: Sequence[nn.Module], dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> FusedLinear:
    """The linears ``modules``, which share their input, as one.

    Args:
        dtype: of the activations; the values of a W4A16 weight are rounded to it (spec 7).
        weight_dtype: storage of float weights; None keeps them, as bf16 where that is lossless.

    Raises:
        ConfigError: linears of different bits, or of a class the engine does not know.
    """
    sources = [_read(module, dtype) for module in modules]
    if len({(s.w_spec, s.a_bits) for s in sources}) != 1:
        raise ConfigError(
            "model: linears that share an input differ in bits; the engine needs one setting"
        )
    first = sources[0]
    bias = _stack_bias(sources, modules)
    quantized = [s.quantized for s in sources if s.quantized is not None]
    if not quantized:
        weight = torch.cat([s.weight for s in sources if s.weight is not None])
        return _float_linear(weight, bias, first.a_bits, weight_dtype)
    codes, scale, multiplier = (
        torch.cat(parts).contiguous() if parts[0] is not None else None
        for parts in zip(*quantized, strict=True)
    )
    bits, group_size = first.w_spec.bits, first.w_spec.group_size
    layout = _layout(codes, bits) if multiplier is None else _layout_of_integer_groups(codes)
    return FusedLinear(
        layout, scale, bias, codes.shape[0], bits, first.a_bits, group_size, multiplier
    )


def _layout(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [n, K] as ``repacked_matmul`` of the backend reads them."""
    return qk.repack_weight(qk.pack_int4(codes) if bits == 4 else codes, bits)


def _layout_of_integer_groups(codes: Tensor) -> Tensor:
    """Codes int8 [n, K] of at most 4 bits as ``integer_group_matmul`` of the backend reads them: on
    the CPU repacked, which is three times as fast for a token, on others in rows.
    """
    packed = qk.pack_int4(codes)
    choice = resolve("integer_group_matmul", codes.device.type, qk.current_backend())
    return qk.repack_weight(packed, 4) if choice.backend == "cpu" else packed


def _stack_bias(sources: Sequence[_Source], modules: Sequence[nn.Module]) -> Tensor | None:
    if all(s.bias is None for s in sources):
        return None
    like = next(s.bias for s in sources if s.bias is not None)
    rows = [
        like.new_zeros(module.out_features) if source.bias is None else source.bias
        for source, module in zip(sources, modules, strict=True)
    ]
    return torch.cat(rows)


def rotary_tables(rotary: nn.Module, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin fp32 [length, D / 2] as transformers computes them, rope scaling included.

    Raises:
        ConfigError: a RoPE variant whose tables depend on the sequence length.
    """
    kind = getattr(rotary, "rope_type", "default")
    if kind in LENGTH_DEPENDENT_ROPE:
        raise ConfigError(
            f"model: RoPE type {kind!r} depends on the sequence length; the engine has fixed tables"
        )
    positions = torch.arange(length, device=device).unsqueeze(0)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=device), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _head(
    module: nn.Module, head_bits: int, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> FusedLinear:
    if head_bits in (16, 32):
        return fuse((module,), dtype, weight_dtype)
    if head_bits != 8:
        raise ConfigError(f"head_bits: {head_bits} is not supported; use 8 or 16")
    codes, scale = qk.quantize(module.weight.detach(), 8)
    layout, bias = qk.repack_weight(codes, 8), module.bias
    return FusedLinear(layout, scale, None if bias is None else bias.detach(), len(codes), 8, 8, -1)


def can_screen(head: nn.Module, head_bits: int) -> bool:
    """Whether the engine runs this head as a plain float product, and its values are finite: what a
    :class:`HeadScreen` needs.
    """
    return (
        type(head) is nn.Linear
        and head.bias is None
        and head_bits in (16, 32)
        and bool(head.weight.isfinite().all())
    )


def extract(
    model: nn.Module,
    *,
    max_len: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    head_bits: int = 16,
    screen_head: bool = False,
) -> ModelWeights:
    """Read a LLaMA-family model of transformers, plain, prepared or converted.

    Args:
        max_len: rows of the rotary tables; at most the model's positions.
        dtype: of the activations.
        weight_dtype: storage of float weights (embedding, head and unquantized linears); None keeps
            the model's own, as bf16 where that is lossless.
        head_bits: 16, or 8 for a head of 8-bit codes that takes 8-bit input.
        screen_head: make a screen of a head for which :func:`can_screen` holds.

    Raises:
        ConfigError: an architecture or layer the engine cannot run. InvalidArgument: ``max_len``.
    """
    family = find_family(model)
    config = model.config
    check_runnable(model, family, max_len)
    base, state = model.model, state_of(model)
    if state is not None:
        state.config.check_codes("engine")
    device = base.embed_tokens.weight.device

    def linear(*modules: nn.Module) -> FusedLinear:
        return fuse(modules, dtype, weight_dtype)

    blocks = []
    for _, block in iter_blocks(model, family):
        attention, mlp = block.self_attn, block.mlp
        before, after = block.input_layernorm, block.post_attention_layernorm
        of_heads = [block.get_submodule(name) for name in family.head_norms]
        blocks.append(
            Block(
                input_norm=before.weight.detach(),
                input_eps=before.variance_epsilon,
                qkv=linear(attention.q_proj, attention.k_proj, attention.v_proj),
                o=linear(attention.o_proj),
                post_norm=after.weight.detach(),
                post_eps=after.variance_epsilon,
                gate_up=linear(mlp.gate_proj, mlp.up_proj),
                down=linear(mlp.down_proj),
                head_norms=tuple(norm.weight.detach() for norm in of_heads) or None,
                head_eps=of_heads[0].variance_epsilon if of_heads else 0.0,
            )
        )
    cos, sin = rotary_tables(base.rotary_emb, max_len, device)
    embedding = base.embed_tokens.weight.detach()
    return ModelWeights(
        embedding=_stored(embedding, weight_dtype),
        blocks=tuple(blocks),
        norm=base.norm.weight.detach(),
        norm_eps=base.norm.variance_epsilon,
        head=_head(model.lm_head, head_bits, dtype, weight_dtype),
        head_screen=(
            make_screen(_stored(model.lm_head.weight.detach(), weight_dtype))
            if screen_head
            else None
        ),
        cos=cos,
        sin=sin,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=2 * cos.shape[1],
        scaling=base.layers[0].self_attn.scaling,
        quantization=QATConfig(16, 16, 16) if state is None else state.config,
    )
