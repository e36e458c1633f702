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
from llmqat.models.families import FAMILIES
from llmqat_kernels.errors import InvalidArgument

GIB = 1 << 30
"""Bytes of a GiB, which the paper's tables call GB."""
FLOAT_BITS = 16
"""Width of what the method does not quantize."""
SCALE_BYTES = 4
"""A scale in memory (spec 3); bf16-representable weight scales need 2 in a file."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense model that decide its cost.

    `gated`: whether the MLP has three linears (gate, up, down) or two. `positions`: learned ones, 0
    with RoPE. `norm_parts`: tensors per norm, 2 with a bias. `head_norms`: whether each head of Q
    and K has a norm.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    gated: bool = True
    positions: int = 0
    norm_parts: int = 1
    head_norms: bool = False

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The sizes in a transformers configuration, by LLaMA's field names (GPT-2's answers to
        them too).

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
        family = FAMILIES.get(getattr(config, "model_type", ""), FAMILIES["llama"])
        if family.positions is not None:
            return cls(
                layers=size("num_hidden_layers"),
                hidden=hidden,
                intermediate=size("n_inner", 4 * hidden),
                heads=heads,
                kv_heads=heads,
                head_dim=hidden // heads,
                vocab=size("vocab_size"),
                tied=bool(getattr(config, "tie_word_embeddings", True)),
                gated=False,
                positions=size("max_position_embeddings"),
                norm_parts=2,
            )
        return cls(
            layers=size("num_hidden_layers"),
            hidden=hidden,
            intermediate=size("intermediate_size"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            vocab=size("vocab_size"),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            head_norms=bool(family.head_norms),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the linears of one decoder layer, by LLaMA's names: seven, or six where the MLP
        is not gated (GPT-2 holds its q, k and v in one).
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gate = {"gate_proj": (self.intermediate, self.hidden)} if self.gated else {}
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            **gate,
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
        config: a transformers configuration of a known family or a :class:`ModelShape`.
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
        qat: ``w_bits``, ``group_size`` and whether scales are integers matter.
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
            if qat.weight.integer_scales:
                scales += n * (SCALE_BYTES + groups)
            else:
                scales += n * groups * SCALE_BYTES
    table = shape.vocab * shape.hidden * float_bits // 8
    norms = (2 * shape.layers + 1) * shape.hidden * shape.norm_parts
    if shape.head_norms:
        norms += 2 * shape.layers * shape.head_dim
    return WeightBytes(
        linears=shape.layers * linears,
        scales=shape.layers * scales,
        embedding=table + shape.positions * shape.hidden * float_bits // 8,
        head=0 if shape.tied else table,
        norms=norms * float_bits // 8,
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


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes in each process of a sharded training (FSDP2), without activations.

    ``student`` (fp32 masters), ``gradients``, ``optimizer`` (both moments of AdamW, fp32) and
    ``teacher`` (bf16) are shards; ``gathered`` is what is whole for a moment at the peak: the
    weights of two blocks (one is fetched ahead) and their gradients, the student's head with its
    gradient, and the teacher's head.
    """

    student: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int

    @property
    def shards(self) -> int:
        """What is held all the time."""
        return self.student + self.gradients + self.optimizer + self.teacher

    @property
    def total(self) -> int:
        """Shards and what is gathered."""
        return self.shards + self.gathered


def training_bytes(config: Any, processes: int) -> TrainingBytes:
    """Bytes in each of ``processes`` that train a model towards a teacher of its own size.

    Args:
        config: see :func:`macs`. processes: GPUs, at least 1.

    Raises:
        InvalidArgument: ``processes`` below 1.
    """
    if processes < 1:
        raise InvalidArgument(f"processes: expected a positive number, got {processes}")
    shape, off = _shape(config), QATConfig(32, 32, 32)
    parameters = weight_bytes(shape, off, float_bits=32).total // 4
    block, head = shape.linear_parameters() // shape.layers, shape.vocab * shape.hidden
    shard = -(-parameters // processes)
    return TrainingBytes(
        student=4 * shard,
        gradients=4 * shard,
        optimizer=8 * shard,
        teacher=2 * shard,
        gathered=2 * (4 + 4) * block + (4 + 4 + 2) * head,
    )


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
