"""The post-training methods by name, with the options that the command line gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError
from llmqat.ptq.awq import awq
from llmqat.ptq.calibration import calibration_tokens
from llmqat.ptq.gptq import gptq
from llmqat.ptq.rtn import rtn
from llmqat.ptq.smoothquant import smooth, smoothquant
from llmqat.ptq.zeroquant import zeroquant
from llmqat.runtime.loading import StrPath, has_tokenizer, load_tokenizer

__all__ = ["METHODS", "Method", "MethodOptions"]

_DATA = ("calibration", "sequences", "seq_len", "seed", "batch_size")


@dataclass(frozen=True)
class Method:
    """What a method needs from the command line.

    Attributes:
        run: called with the model, its settings, and (where `options` has "calibration") tokens.
        options: the options that mean something to it.
        journaled: whether finished blocks are kept for `--resume`.
        unpacked: called like `run`, but gives a prepared model, with the same values: so every
            setting can be measured. None where the method chooses codes, which need the packed
            grid.
    """

    run: Callable[..., nn.Module]
    options: tuple[str, ...]
    journaled: bool = False
    unpacked: Callable[..., nn.Module] | None = None


def _smooth_unpacked(
    model: nn.Module, config: QATConfig, tokens: Tensor, **options: Any
) -> nn.Module:
    return prepare(smooth(model, tokens, **options), config)


METHODS = {
    "rtn": Method(rtn, ("rank",), unpacked=prepare),
    "smoothquant": Method(
        smoothquant,
        (*_DATA, "alpha", "folds", "key_alpha", "keep_float"),
        unpacked=_smooth_unpacked,
    ),
    "gptq": Method(gptq, (*_DATA, "damping", "act_order", "token_limit", "rank"), journaled=True),
    "awq": Method(awq, (*_DATA, "grid", "folds", "token_limit"), journaled=True),
    "zeroquant": Method(zeroquant, (*_DATA, "steps", "lr", "token_limit", "rank"), journaled=True),
}
_LOWEST = {"sequences": 1, "seq_len": 2, "seed": 0, "batch_size": 1, "rank": 1}
_NAMES = sorted({name for method in METHODS.values() for name in method.options})


def _option(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass(kw_only=True)
class MethodOptions:
    """Options of the methods; None is the method's own default. A command that runs methods extends
    it with `seq_len` and `batch_size`, which `fields_of` may name otherwise.
    """

    fields_of: ClassVar[dict[str, str]] = {}
    """Field of the subclass for an option of `METHODS`, where the two names differ."""

    calibration: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to look at: .txt, .jsonl or .parquet files, or folders of generated"
            " records. All methods but rtn need it."
        },
    )
    sequences: int | None = _option("At most so many calibration sequences; default 128.")
    seed: int | None = _option("Choice of the sequences (and zeroquant's order); default 0.")
    alpha: float | None = _option("smoothquant: share of the spread moved to weights; 0.5.")
    folds: str | None = _option(
        "smoothquant, awq: where channel scales go: none, norms (smoothquant's default), norms+down"
        " or all."
    )
    key_alpha: float | None = _option(
        "smoothquant: even out the channels of K, at no cost to the weights: 0 (no), up to 1."
    )
    damping: float | None = _option("gptq: part of the mean diagonal added to it; 0.01.")
    act_order: bool = field(
        default=False, metadata={"help": "gptq: columns by falling use, not in order."}
    )
    token_limit: float | None = _option(
        "gptq, awq, zeroquant: tokens longer than this many times the median count as of that"
        " length; 3, and 0 for none."
    )
    grid: int | None = _option("awq: ratios tried per group of linears; 20.")
    steps: int | None = _option("zeroquant: AdamW steps per block; 64.")
    lr: float | None = _option("zeroquant: peak learning rate; 1e-4.")
    rank: int | None = _option(
        "rtn, gptq, zeroquant in llmqat eval: rank of a float correction beside every quantized"
        " weight (LoRC of ZeroQuant-V2); none by default. It has no packed form."
    )

    def check_options(self, name: str | None) -> None:
        """ConfigError for an option that means nothing to the method `name` (None: no method), one
        out of range, or missing calibration text.
        """
        if name is not None and name not in METHODS:
            raise ConfigError(f"--method: {name!r} is not supported; use {', '.join(METHODS)}")
        accepted = () if name is None else METHODS[name].options
        for option in _NAMES:
            if not self._given(option) or option in accepted:
                continue
            flag = self._field(option).replace("_", "-")
            if name is None:
                raise ConfigError(f"--{flag}: means nothing without --method")
            raise ConfigError(f"--{flag}: means nothing to --method {name}; leave it out")
        if "calibration" in accepted and not self.calibration:
            raise ConfigError(
                f"--calibration: --method {name} looks at text; name a .txt, .jsonl or .parquet"
                " file, or a folder of llmqat generate-data"
            )
        for option, low in _LOWEST.items():
            value = self._value(option)
            if option in accepted and value is not None and value < low:
                flag = self._field(option).replace("_", "-")
                raise ConfigError(
                    f"--{flag}: {value} is not supported; use an integer of at least {low}"
                )

    def method_options(self, name: str) -> dict[str, Any]:
        """The keyword arguments of the method that were given; `rank` is one of `compensate`."""
        method = METHODS[name]
        names = set(method.options) - {*_DATA, "keep_float"}
        if "calibration" in method.options:
            names.add("batch_size")
        if name == "zeroquant":
            names.add("seed")
        return {option: self._value(option) for option in sorted(names) if self._given(option)}

    def tokens(self, model: Any, folder: StrPath) -> Tensor | None:
        """Calibration tokens int64 [n, seq_len], or None without `calibration`.

        Args:
            model: the model that they are for.
            folder: where its tokenizer lies.

        Raises:
            DataError, ConfigError, CheckpointError: see `calibration_tokens`.
        """
        if not self.calibration:
            return None
        text = any(not Path(path).is_dir() for path in self.calibration)
        # A generated folder holds ids; a model without tokenizer can be calibrated on it.
        tokenizer = load_tokenizer(folder) if text and has_tokenizer(folder) else None
        given = {
            option: self._value(option)
            for option in ("sequences", "seq_len", "seed")
            if self._value(option) is not None
        }
        return calibration_tokens(
            self.calibration, tokenizer=tokenizer, vocab_size=model.config.vocab_size, **given
        )

    def _field(self, option: str) -> str:
        return self.fields_of.get(option, option)

    def _value(self, option: str) -> Any:
        return getattr(self, self._field(option), None)

    def _given(self, option: str) -> bool:
        value = self._value(option)
        return value is not None and value is not False  # 0 and 0.0 are values
