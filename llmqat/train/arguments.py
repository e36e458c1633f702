"""Options of `llmqat train`, and the quantization options that it shares with `llmqat eval`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.train.losses import Loss, find_loss, parse_weights
from llmqat.train.observe import parse_layers

__all__ = ["QuantArguments", "TrainArguments"]

DTYPES = ("float32", "bfloat16")
SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_restarts",
    "inverse_sqrt",
)
"""The schedules of transformers that need no further settings."""
_RUN_FIELDS = (
    "output", "resume", "threads", "save_limit", "save_steps", "log_steps", "health_steps",
)  # fmt: skip
"""Options that may change between a run and its resumption; all others decide its result."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """ConfigError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ConfigError(f"--{name}: {value!r} is not supported; use {', '.join(accepted)}")


def check_number(name: str, value: object, low: float, *, whole: bool = True) -> None:
    """ConfigError unless `value` is a finite number >= low (an integer where `whole`)."""
    kinds = int if whole else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or not math.isfinite(value)
        or value < low
    ):
        kind = "an integer" if whole else "a number"
        raise ConfigError(f"--{name}: {value!r} is not supported; use {kind} of at least {low}")


@dataclass
class QuantArguments:
    """What is quantized; nothing given means nothing is."""

    bits: str | None = _option(None, "W-A-KV bits such as 4-8-4; 16 or 32 is off.")
    w_bits: int | None = _option(None, "Weight bits; overrides the first number of --bits.")
    a_bits: int | None = _option(None, "Activation bits; overrides the second number of --bits.")
    kv_bits: int | None = _option(None, "KV cache bits; overrides the third number of --bits.")
    kv_mode: str | None = _option(
        None,
        "paper (default: before RoPE, one scale per token) or serving (after RoPE, per head).",
    )
    group_size: int | None = _option(
        None, "Weight columns that share a scale; default: the whole row."
    )
    weight_scale_dtype: str | None = _option(
        None,
        "bfloat16 (the default), float32, or integer (groups: whole multiples of a row's scale).",
    )
    ste_clip: float | None = _option(
        None, "Zero the gradient where |x| reaches this; the released code used 2.0."
    )
    w_quantizer: str | None = _option(
        None, "Weights: symmetric (default), asymmetric or statsq (clipped)."
    )
    a_quantizer: str | None = _option(
        None, "Activations: symmetric (default), asymmetric or lsq (clipped, learned scale)."
    )
    kv_quantizer: str | None = _option(None, "Keys and values: symmetric (default) or asymmetric.")
    numerics: str | None = _option(
        None, "spec (default), or official: the arithmetic of the released code, for comparison."
    )
    a_group_size: int | None = _option(
        None, "Input channels that share a scale (W4A4 of table 8); default: whole tokens."
    )
    a_group_axis: str | None = _option(
        None,
        "channel_over_tokens (default: one scale per group over all tokens) or channel_per_token.",
    )

    def to_config(self) -> QATConfig | None:
        """The settings given, or None if there are none.

        Raises:
            ConfigError: an incomplete or unsupported setting.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            return None
        if "bits" in given:
            fields = QATConfig.parse(given.pop("bits")).to_dict()
            return QATConfig.from_dict({**fields, **given})
        missing = [
            f"--{name.replace('_', '-')}"
            for name in ("w_bits", "a_bits", "kv_bits")
            if name not in given
        ]
        if missing:
            raise ConfigError(
                f"--bits: not given, and {', '.join(missing)} neither; write e.g. --bits 4-8-4"
            )
        return QATConfig.from_dict(given)


@dataclass
class TrainArguments:
    """What is trained, on what and how; the defaults are the paper's (LLM-QAT section 3.1)."""

    model: str = field(
        metadata={"help": "Folder of the full-precision model that the student starts from."}
    )
    data: str = field(
        metadata={"help": "Folder of generated records, or a .txt, .jsonl or .parquet file."}
    )
    output: str = field(
        metadata={"help": "Folder for the prepared student, checkpoints and metrics."}
    )
    teacher: str | None = _option(None, "Folder of the teacher; default: --model.")
    teacher_logits: bool = _option(
        False,
        "Train from the probabilities that llmqat teacher-logits saved in --data; no teacher is"
        " loaded (one named by --teacher is only checked).",
    )
    loss: str = _option(
        "logits", "logits (the paper's), label, hidden, attention, or a sum such as label+logits."
    )
    loss_weights: str | None = _option(
        None, "Weights of the terms of --loss, in its order, such as 1,1,10; default: 1 each."
    )
    loss_layers: str = _option(
        "all", "Decoder blocks of hidden and attention: all, last or numbers such as 0,5,11."
    )
    lr: float = _option(2e-5, "Peak learning rate.")
    lr_scheduler: str = _option(
        "cosine", "How it falls after the warm-up, by transformers' names: cosine, linear, ..."
    )
    steps: int | None = _option(None, "Optimizer steps; default: what --epochs gives.")
    epochs: float = _option(1.0, "Passes over the data, unless --steps is given.")
    batch_size: int = _option(1, "Sequences per device and micro-batch.")
    grad_accum: int = _option(1, "Micro-batches per optimizer step.")
    seq_len: int = _option(2048, "Tokens per packed sequence.")
    warmup_steps: int = _option(0, "Steps of linear warm-up.")
    weight_decay: float = _option(0.0, "AdamW weight decay.")
    adam_beta2: float = _option(0.999, "AdamW's decay of the squared gradients' mean.")
    max_grad_norm: float = _option(1.0, "Gradients are scaled down to this norm.")
    seed: int = _option(42, "Seed of the data order.")
    device: str = _option("cpu", "cpu or cuda.")
    threads: int | None = _option(None, "CPU threads; torch's default otherwise.")
    dtype: str = _option(
        "float32",
        "float32, or bfloat16: autocast over fp32 masters (slower than float32 on many CPUs).",
    )
    gradient_checkpointing: bool = _option(
        False, "Recompute activations in backward: less memory, same result."
    )
    fused: bool = _option(
        False, "Norms, RoPE and SwiGLU write the codes that linears read: faster and leaner."
    )
    chunk_size: int | None = _option(
        None, "Tokens whose logits exist at one time; default a quarter of them, at most 1024."
    )
    log_steps: int = _option(1, "Steps between logged losses.")
    health_steps: int = _option(
        10, "Steps between reports on flipped and saturated codes; 0 for none."
    )
    save_steps: int = _option(500, "Steps between checkpoints.")
    save_limit: int = _option(2, "Checkpoints kept.")
    resume: bool = _option(False, "Go on from the newest complete checkpoint in --output.")

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("lr-scheduler", self.lr_scheduler, SCHEDULERS)
        parse_layers(self.loss_layers)
        loss = self.to_loss()
        if self.teacher_logits and loss.watches():
            raise ConfigError(
                f"--teacher-logits: serves logits and label+logits, not {self.loss}, which compares"
                " the blocks of a loaded teacher"
            )
        if self.teacher_logits and not loss.needs_teacher:
            raise ConfigError(f"--teacher-logits: loss {self.loss} has no use for them; leave it")
        for name in (
            "batch_size",
            "grad_accum",
            "log_steps",
            "save_steps",
            "save_limit",
        ):
            check_number(name.replace("_", "-"), getattr(self, name), 1)
        for name in ("warmup_steps", "health_steps", "seed"):
            check_number(name.replace("_", "-"), getattr(self, name), 0)
        for name in ("lr", "epochs", "weight_decay", "max_grad_norm"):
            check_number(name.replace("_", "-"), getattr(self, name), 0, whole=False)
        check_number("adam-beta2", self.adam_beta2, 0, whole=False)
        if self.adam_beta2 >= 1:
            raise ConfigError(f"--adam-beta2: {self.adam_beta2} must be below 1")
        check_number("seq-len", self.seq_len, 2)
        if self.steps is not None:
            check_number("steps", self.steps, 1)
        if self.chunk_size is not None:
            check_number("chunk-size", self.chunk_size, 1)
        if self.lr == 0 or (self.steps is None and self.epochs == 0):
            raise ConfigError("--lr, --epochs: 0 trains nothing; give positive numbers")

    def to_loss(self) -> Loss:
        """The loss with its weights; ConfigError for terms and weights that do not fit."""
        return find_loss(self.loss, parse_weights(self.loss_weights))

    def identity(self) -> dict[str, Any]:
        """The options that decide the result of a run: a resumed run must have the same."""
        return {name: value for name, value in asdict(self).items() if name not in _RUN_FIELDS}

    def to_trainer(self, *, use_cpu: bool, report_to: str) -> dict[str, Any]:
        """These options by their transformers names, for `training_arguments`."""
        return {
            "learning_rate": self.lr,
            "lr_scheduler_type": self.lr_scheduler,
            "adam_beta2": self.adam_beta2,
            "max_steps": -1 if self.steps is None else self.steps,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.grad_accum,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
            "bf16": self.dtype == "bfloat16",
            "gradient_checkpointing": self.gradient_checkpointing,
            "logging_steps": self.log_steps,
            "save_steps": self.save_steps,
            "save_total_limit": self.save_limit,
            "use_cpu": use_cpu,
            "report_to": report_to,
        }
