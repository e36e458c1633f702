"""config.json of a checkpoint as checked numbers; nothing else of it reaches transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmqat.checkpoint.validate import is_count, printable
from llmqat.errors import CheckpointError
from llmqat.models.families import ALWAYS, FAMILIES, NEVER, Family, supported

MAX_VOCAB = 1 << 20
MAX_POSITIONS = 1 << 20
MAX_WIDTH = 1 << 17
MAX_LAYERS = 1024
MAX_HEAD_DIM = 256
FLOAT_DTYPES = ("float32", "float16", "bfloat16")

DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
"""What transformers takes where config.json has no max_position_embeddings."""
LAYER_TYPES = ("full_attention", "sliding_attention")
GPT2_ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu")

FORBIDDEN_KEYS = ("auto_map", "model_file", "custom_pipelines", "trust_remote_code")
"""Keys that make loaders run code from the folder; they are refused, not ignored."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model, the family they belong to, and the checked fields for its transformers
    config. `positions` counts the learned ones where the family has them.
    """

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tied: bool
    dtype: str
    fields: dict[str, Any]

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.positions or int(self.fields["max_position_embeddings"])

    @property
    def embedding(self) -> str:
        """Name of the embedding's tensor."""
        return f"{self.family.embedding}.weight"

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a block's linear by its name within the block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "attn.c_attn": (q + 2 * kv, self.hidden),
            "attn.c_proj": (self.hidden, q),
            "mlp.c_fc": (self.intermediate, self.hidden),
            "mlp.c_proj": (self.hidden, self.intermediate),
        }[name]

    def weight_shape(self, name: str) -> tuple[int, int]:
        """Shape of the float weight of a block's linear in a checkpoint: (N, K), or (K, N) for the
        Conv1D of GPT-2.
        """
        n, k = self.linear_shape(name)
        return (k, n) if self.family.transposed else (n, k)

    def has_bias(self, name: str) -> bool:
        """Whether a block's linear has a bias."""
        switch = self.family.bias_switch(name)
        return bool(self.fields[switch]) if switch not in (NEVER, ALWAYS) else switch == ALWAYS


class _Reader:
    """Typed access to the keys of a config; every key that is read is kept for transformers."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.fields: dict[str, Any] = {}

    def fail(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {key} is {printable(self.raw.get(key))}; expected {wanted}"
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            value = default
        if not is_count(value, high) or value < low:
            raise self.fail(key, f"an integer in {low}..{high}")
        self.fields[key] = value
        return value

    def switch(self, key: str, wanted: bool, why: str) -> None:
        """A boolean of which only one value is supported."""
        if self.boolean(key, wanted) is not wanted:
            raise CheckpointError(f"{self.where}: {key} is {not wanted}; {why}")

    def choice(self, key: str, accepted: tuple[str, ...]) -> None:
        value = self.raw.get(key, accepted[0])
        if not isinstance(value, str) or value not in accepted:
            raise self.fail(key, " or ".join(repr(name) for name in accepted))
        self.fields[key] = value

    def number(
        self, key: str, default: float, accept: Callable[[float], bool], wanted: str
    ) -> None:
        value = self.raw.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not accept(value)
        ):
            raise self.fail(key, wanted)
        self.fields[key] = float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        self.fields[key] = value
        return value


def parse_architecture(raw: dict[str, Any], where: str) -> Architecture:
    """Check a config.json object.

    Raises:
        CheckpointError: one line that names `where`, the key and what is accepted.
    """
    for key in FORBIDDEN_KEYS:
        if key in raw:
            raise CheckpointError(f"{where}: {key} asks for code from the folder; remove the key")
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {printable(model_type)} is not supported; supported:"
            f" {supported()}"
        )
    if raw.get("architectures", [family.architecture]) not in ([family.architecture], None):
        raise CheckpointError(
            f"{where}: architectures {printable(raw['architectures'])}; expected"
            f" {family.architecture}"
        )
    read = _Reader(raw, where)
    if family.name == "gpt2":
        return _read_gpt2(read, family)
    return _read_llama_like(read, family)


def _read_llama_like(read: _Reader, family: Family) -> Architecture:
    """The families whose blocks are LLaMA's, but for biases, windows and norms of heads."""
    name, raw, where = family.name, read.raw, read.where
    hidden = read.integer("hidden_size", 1, MAX_WIDTH)
    intermediate = read.integer("intermediate_size", 1, 1 << 20)
    layers = read.integer("num_hidden_layers", 1, MAX_LAYERS)
    heads = read.integer("num_attention_heads", 1, hidden)
    # Other families' classes have fixed numbers in this place where config.json says nothing.
    absent = heads if name == "llama" or "num_key_value_heads" in raw else None
    kv_heads = read.integer("num_key_value_heads", 1, heads, default=absent)
    head_dim = read.integer(
        "head_dim", 2, MAX_HEAD_DIM, default=128 if name == "qwen3" else hidden // heads
    )
    vocab = read.integer("vocab_size", 1, MAX_VOCAB)
    positions = DEFAULT_POSITIONS[name]
    read.integer("max_position_embeddings", 1, MAX_POSITIONS, default=positions)
    if hidden % heads or heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{where}: hidden_size {hidden}, num_attention_heads {heads}, num_key_value_heads"
            f" {kv_heads} and head_dim {head_dim} do not fit; heads divide hidden_size, KV heads"
            " divide heads, head_dim is even"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise read.fail("hidden_act", "'silu'")
    read.number("rms_norm_eps", 1e-6, lambda v: 0 < v < 1, "a number between 0 and 1")
    read.number("initializer_range", 0.02, lambda v: 0 <= v <= 1, "a number in 0..1")
    read.number("attention_dropout", 0.0, lambda v: 0 <= v < 1, "a number in 0..1")
    tied = read.boolean("tie_word_embeddings", False)
    for switch, _ in family.bias:
        if switch not in (NEVER, ALWAYS):
            read.boolean(switch, False)
    read.boolean("use_cache", True)
    if name != "llama":
        _read_window(read, family, layers)
    _read_token_ids(read, vocab)
    _read_rope(read)
    return Architecture(
        family,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab,
        0,
        tied,
        _read_dtype(read),
        read.fields,
    )


def _read_window(read: _Reader, family: Family, layers: int) -> None:
    """Sliding windows: of all layers (Mistral), or of those that layer_types names (Qwen)."""
    if read.raw.get("sliding_window", 4096) is None:
        read.fields["sliding_window"] = None
    else:
        read.integer("sliding_window", 1, MAX_POSITIONS, default=4096)
    if family.name == "mistral":
        return
    read.boolean("use_sliding_window", False)
    read.integer("max_window_layers", 0, MAX_LAYERS, default=28)
    kinds = read.raw.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(LAYER_TYPES):
        raise read.fail("layer_types", f"{layers} of {' and '.join(LAYER_TYPES)}")
    read.fields["layer_types"] = list(kinds)


def _read_gpt2(read: _Reader, family: Family) -> Architecture:
    hidden = read.integer("n_embd", 1, MAX_WIDTH, default=768)
    layers = read.integer("n_layer", 1, MAX_LAYERS, default=12)
    heads = read.integer("n_head", 1, hidden, default=12)
    positions = read.integer("n_positions", 1, MAX_POSITIONS, default=1024)
    intermediate = read.integer("n_inner", 1, 1 << 20, default=4 * hidden)
    vocab = read.integer("vocab_size", 1, MAX_VOCAB, default=50257)
    if hidden % heads or hidden // heads > MAX_HEAD_DIM:
        raise CheckpointError(
            f"{read.where}: n_embd {hidden} and n_head {heads} do not fit; heads divide n_embd, and"
            f" a head has at most {MAX_HEAD_DIM} numbers"
        )
    read.choice("activation_function", GPT2_ACTIVATIONS)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        read.number(key, 0.1, lambda v: 0 <= v < 1, "a number in 0..1")
    read.number("layer_norm_epsilon", 1e-5, lambda v: 0 < v < 1, "a number between 0 and 1")
    read.number("initializer_range", 0.02, lambda v: 0 <= v <= 1, "a number in 0..1")
    read.boolean("scale_attn_weights", True)
    read.boolean("scale_attn_by_inverse_layer_idx", False)
    read.boolean("reorder_and_upcast_attn", False)
    read.switch("add_cross_attention", False, "only decoders without an encoder are supported")
    tied = read.boolean("tie_word_embeddings", True)
    read.boolean("use_cache", True)
    _read_token_ids(read, vocab)
    return Architecture(
        family,
        hidden,
        intermediate,
        layers,
        heads,
        heads,
        hidden // heads,
        vocab,
        positions,
        tied,
        _read_dtype(read),
        read.fields,
    )


def _read_dtype(read: _Reader) -> str:
    value = read.raw.get("dtype", read.raw.get("torch_dtype")) or "float32"
    if not isinstance(value, str) or value not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{read.where}: dtype is {printable(value)}; expected one of {', '.join(FLOAT_DTYPES)}"
        )
    return value


def _read_token_ids(read: _Reader, vocab: int) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in read.raw:
            continue
        value = read.raw[key]
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        # -1 is what LLaMA 1 conversions wrote for "no padding token".
        if (
            value is not None
            and value != -1
            and not (0 < len(ids) <= 64 and all(is_count(i, vocab - 1) for i in ids))
        ):
            raise read.fail(key, f"token ids below {vocab}, or null")
        read.fields[key] = None if value == -1 and not isinstance(value, bool) else value


def _read_rope(read: _Reader) -> None:
    if "rope_theta" in read.raw:
        read.number("rope_theta", 10_000.0, lambda v: v > 0, "a positive number")
    for key in ("rope_parameters", "rope_scaling"):
        value = read.raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise read.fail(key, "an object")
        kind = value.get("rope_type", value.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise CheckpointError(
                f"{read.where}: {key}.rope_type is {printable(kind)}; expected"
                f" {', '.join(ROPE_TYPES)}"
            )
        for name, number in value.items():
            if name in ("rope_type", "type"):
                if number != kind:
                    raise CheckpointError(
                        f"{read.where}: {key}.{name} is {printable(number)}, but rope_type {kind}"
                    )
            elif name == "truncate" and isinstance(number, bool):
                continue
            elif name not in ROPE_NUMBERS:
                raise CheckpointError(
                    f"{read.where}: {key}.{printable(name)} is unknown; remove it"
                )
            elif (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not 0 < number < 1e15
            ):
                raise CheckpointError(
                    f"{read.where}: {key}.{name} is {printable(number)}; expected a positive number"
                )
        read.fields[key] = dict(value)
