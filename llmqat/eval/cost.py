"""What a bit setting costs: operations, weight bytes and KV bytes, from a configuration alone.

Operations follow LLM-QAT's measure, ``OPs = MACs * weight bits * activation bits`` for one pass
over ``seq_len`` tokens. The paper does not say what it counts; counting the linears of the decoder
layers alone reproduces its comparison of LLaMA-13B at W4A8 with 7B at W8A8: hence the default.
Attention and head can be added: the head at 16 x 16 bits, both attention products at 16 x KV bits
(queries and probabilities are not quantized) over the full ``seq_len`` x ``seq_len`` square.

Bytes are those this project stores (spec 3, 8, 9): codes of up to 4 bits take half a byte, wider
ones a byte; embedding, head and norms stay at ``float_bits``; scales are counted apart, because the
paper leaves them out. Biases are not counted (below 0.1 %).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmqat.config import OFF_BITS, QATConfig
from llmqat.errors import ConfigError
from llmqat_kernels.errors import InvalidArgument

GIB = 1 << 30
"""Bytes of a GiB, which the paper's tables call GB."""
FLOAT_BITS = 16
"""Width of what the method does not quantize."""
SCALE_BYTES = 4
"""A scale in memory (spec 3); bf16-representable weight scales need 2 in a file."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense LLaMA-family model that decide its cost."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The sizes in a transformers configuration with LLaMA's field names.

        Raises:
            ConfigError: a size is missing or not positive, or the model is a mixture of experts.
        """
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if getattr(config, name, None):
                raise ConfigError(f"{name}: the cost of mixtures of experts is not defined here")

        def size(name: str, default: int | None = None) -> int:
            value = getattr(config, name, None)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{name}: expected a positive integer in the model's configuration"
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            layers=size("num_hidden_layers"),
            hidden=hidden,
            intermediate=size("intermediate_size"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            vocab=size("vocab_size"),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the seven linears of one decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def linear_parameters(self) -> int:
        """Weights of all quantized linears."""
        return self.layers * sum(n * k for n, k in self.linears().values())


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights; ``head`` is 0 where it is tied to the embedding."""

    linears: int
    scales: int
    embedding: int
    head: int
    norms: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.linears + self.scales + self.embedding + self.head + self.norms


@dataclass(frozen=True)
class KVBytes:
    """Bytes of the KV cache for one token of one sequence, all layers."""

    codes: int
    scales: int

    @property
    def total(self) -> int:
        """Codes (or floats) and scales."""
        return self.codes + self.scales


@dataclass(frozen=True)
class Cost:
    """What :func:`cost` found; bytes, and operations for ``seq_len`` tokens."""

    setting: str
    seq_len: int
    macs: int
    ops: int
    weights: WeightBytes
    kv_per_token: KVBytes

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, nested, with both totals; for JSON."""
        values = asdict(self)
        values["weights"]["total"] = self.weights.total
        values["kv_per_token"]["total"] = self.kv_per_token.total
        return values


def _shape(config: Any) -> ModelShape:
    return config if isinstance(config, ModelShape) else ModelShape.from_config(config)


def _row_bytes(columns: int, bits: int) -> int:
    """Bytes of one row of codes (spec 8: an odd last column takes a byte) or floats."""
    if bits in OFF_BITS:
        return columns * bits // 8
    return (columns + 1) // 2 if bits <= 4 else columns


def _counted_macs(
    shape: ModelShape, seq_len: int, attention: bool, head: bool
) -> tuple[int, int, int]:
    if seq_len < 1:
        raise InvalidArgument(f"seq_len: expected a positive number, got {seq_len}")
    width = shape.heads * shape.head_dim
    return (
        shape.linear_parameters() * seq_len,
        2 * shape.layers * width * seq_len**2 if attention else 0,
        shape.vocab * shape.hidden * seq_len if head else 0,
    )


def macs(
    config: Any, seq_len: int = 2048, *, include_attention: bool = False, include_head: bool = False
) -> int:
    """Multiply-accumulates of one pass over ``seq_len`` tokens.

    Args:
        config: a transformers configuration of the LLaMA family (GQA, tied heads) or a
            :class:`ModelShape`.
        seq_len: tokens.
        include_attention: add both attention products, full square.
        include_head: add the vocabulary projection of every token.

    Raises:
        ConfigError: see :meth:`ModelShape.from_config`.
        InvalidArgument: ``seq_len`` below 1.
    """
    return sum(_counted_macs(_shape(config), seq_len, include_attention, include_head))


def ops(
    config: Any,
    qat: QATConfig,
    seq_len: int = 2048,
    *,
    include_attention: bool = False,
    include_head: bool = False,
) -> int:
    """``MACs * weight bits * activation bits`` for one pass; the module's head says more.

    Args and errors: see :func:`macs`. ``qat`` gives the bits; 16 and 32 count as themselves.
    """
    linears, attention, head = _counted_macs(
        _shape(config), seq_len, include_attention, include_head
    )
    return (
        linears * qat.w_bits * qat.a_bits
        + attention * FLOAT_BITS * qat.kv_bits
        + head * FLOAT_BITS * FLOAT_BITS
    )


def weight_bytes(config: Any, qat: QATConfig, *, float_bits: int = FLOAT_BITS) -> WeightBytes:
    """Bytes of the weights under ``qat``, by part.

    Args:
        config: see :func:`macs`.
        qat: ``w_bits`` and ``group_size`` matter.
        float_bits: width of embedding, head and norms, 16 or 32.
    """
    if float_bits not in OFF_BITS:
        raise InvalidArgument(f"float_bits: expected 16 or 32, got {float_bits}")
    shape = _shape(config)
    linears = scales = 0
    for n, k in shape.linears().values():
        linears += n * _row_bytes(k, qat.w_bits)
        if qat.w_bits not in OFF_BITS:
            groups = 1 if qat.group_size < 0 else -(-k // qat.group_size)
            scales += n * groups * SCALE_BYTES
    table = shape.vocab * shape.hidden * float_bits // 8
    return WeightBytes(
        linears=shape.layers * linears,
        scales=shape.layers * scales,
        embedding=table,
        head=0 if shape.tied else table,
        norms=(2 * shape.layers + 1) * shape.hidden * float_bits // 8,
    )


def kv_bytes_per_token(config: Any, qat: QATConfig) -> KVBytes:
    """Bytes the KV cache takes for each token of a sequence (spec 9).

    Args:
        config: see :func:`macs`.
        qat: ``kv_bits`` and ``kv_mode``: ``paper`` has one fp32 scale per token for K and one
            for V in each layer, ``serving`` one per KV head. A float cache has no scales.
    """
    shape = _shape(config)
    rows = 2 * shape.layers * shape.kv_heads
    scales = 0
    if qat.kv_bits not in OFF_BITS:
        scales = (rows if qat.kv_mode == "serving" else 2 * shape.layers) * SCALE_BYTES
    return KVBytes(codes=rows * _row_bytes(shape.head_dim, qat.kv_bits), scales=scales)


def cost(
    config: Any,
    qat: QATConfig,
    seq_len: int = 2048,
    *,
    include_attention: bool = False,
    include_head: bool = False,
) -> Cost:
    """Operations, weight bytes and KV bytes of one setting in one record; arguments as above."""
    switches = {"include_attention": include_attention, "include_head": include_head}
    return Cost(
        setting=qat.setting,
        seq_len=seq_len,
        macs=macs(config, seq_len, **switches),
        ops=ops(config, qat, seq_len, **switches),
        weights=weight_bytes(config, qat),
        kv_per_token=kv_bytes_per_token(config, qat),
    )
