"""``llmqat quantize``: a packed checkpoint of a full-precision model by a post-training method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmqat.checkpoint import save_pretrained, verify_export
from llmqat.checkpoint.format import EMBEDDING, TORCH_DTYPES
from llmqat.checkpoint.load import inspect
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.ptq import (
    BlockJournal,
    awq,
    calibration_tokens,
    gptq,
    rtn,
    smooth,
    smoothquant,
    zeroquant,
)
from llmqat.ptq.calibration import fingerprint
from llmqat.runtime.loading import (
    has_tokenizer,
    load_model,
    load_tokenizer,
    parse_device,
    parse_dtype,
    set_threads,
)
from llmqat.state import state_of
from llmqat.train.arguments import QuantArguments, check_choice, check_number

MIB = 2**20
_DATA = ("calibration", "sequences", "seq_len", "seed", "batch_size")


@dataclass(frozen=True)
class Method:
    """What a method needs from the command line.

    Attributes:
        run: called with the model, its settings, and (where `options` has "calibration") tokens.
        options: the options that mean something to it.
        journaled: whether finished blocks are kept for `--resume`.
    """

    run: Callable[..., nn.Module]
    options: tuple[str, ...]
    journaled: bool = False


METHODS = {
    "rtn": Method(rtn, ()),
    "smoothquant": Method(smoothquant, (*_DATA, "alpha", "folds", "keep_float")),
    "gptq": Method(gptq, (*_DATA, "damping", "act_order", "token_limit"), journaled=True),
    "awq": Method(awq, (*_DATA, "grid", "folds", "token_limit"), journaled=True),
    "zeroquant": Method(zeroquant, (*_DATA, "steps", "lr", "token_limit"), journaled=True),
}


def _option(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass
class QuantizeArguments:
    """Options of ``llmqat quantize``; None is the method's own default."""

    model: str = field(metadata={"help": "Folder of a full-precision model."})
    output: str = field(metadata={"help": "Folder of the packed checkpoint."})
    method: str = field(metadata={"help": "rtn, smoothquant, gptq, awq or zeroquant."})
    calibration: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to look at: .txt, .jsonl or .parquet files, or folders of generated"
            " records. All methods but rtn need it."
        },
    )
    sequences: int | None = _option("At most so many calibration sequences; default 128.")
    seq_len: int | None = _option("Tokens per calibration sequence; default 512.")
    seed: int | None = _option("Choice of the sequences (and zeroquant's order); default 0.")
    batch_size: int | None = _option("Calibration sequences per pass; default 8, zeroquant 4.")
    alpha: float | None = _option("smoothquant: share of the spread moved to weights; 0.5.")
    folds: str | None = _option(
        "smoothquant, awq: where channel scales go: norms (smoothquant's default), norms+down or"
        " all."
    )
    keep_float: bool = field(
        default=False,
        metadata={
            "help": "smoothquant: write the smoothed float model (for llmqat train), unpacked."
        },
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
    dtype: str | None = _option(
        "Type of embeddings, norms and head in the output; the model's otherwise."
    )
    compute_dtype: str = field(
        default="float32", metadata={"help": "Type the method computes in; float32 is exact."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int | None = _option("CPU threads; torch's default otherwise.")
    resume: bool = field(
        default=False,
        metadata={
            "help": "gptq, awq, zeroquant: go on from the blocks that a killed run finished."
        },
    )
    verify: bool = field(
        default=False, metadata={"help": "Reload the folder and compare every bit."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object."})

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        method = METHODS[self.method]
        names = sorted({name for each in METHODS.values() for name in each.options})
        for name in names:
            if self._given(name) and name not in method.options:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: means nothing to --method {self.method}; leave"
                    " it out"
                )
        if "calibration" in method.options and not self.calibration:
            raise ConfigError(
                f"--calibration: --method {self.method} looks at text; name a .txt, .jsonl or"
                " .parquet file, or a folder of llmqat generate-data"
            )
        if self.resume and not method.journaled:
            raise ConfigError(f"--resume: --method {self.method} has nothing to go on from")
        for name, low in (("sequences", 1), ("seq_len", 2), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None:
                check_number(name.replace("_", "-"), value, low)

    def method_options(self) -> dict[str, Any]:
        """The keyword arguments of the method that were given."""
        method = METHODS[self.method]
        names = set(method.options) - {*_DATA, "keep_float"} | {"batch_size"}
        if self.method == "zeroquant":
            names.add("seed")
        if "calibration" not in method.options:
            names.discard("batch_size")
        return {name: getattr(self, name) for name in sorted(names) if self._given(name)}

    def _given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False  # 0 and 0.0 are values


ARGUMENTS = (QuantizeArguments, QuantArguments)


def quantize(arguments: QuantizeArguments, config: QATConfig | None) -> dict[str, Any]:
    """Load, calibrate, quantize, save; what was done as JSON values.

    Raises:
        ConfigError, CheckpointError, DataError, OSError: one line each.
    """
    a, started = arguments, time.perf_counter()
    output = Path(a.output)
    if a.keep_float:
        if config is not None:
            raise ConfigError("--bits: --keep-float quantizes nothing; leave one of them out")
        if a.verify:
            raise ConfigError("--verify: compares a packed checkpoint; leave out --keep-float")
    elif config is None:
        raise ConfigError("--bits: not given; write e.g. --bits 4-8-8")
    else:
        config.check_packable()
    if output.resolve() == Path(a.model).resolve():
        raise ConfigError(f"--output: {a.output} is the model's own folder; name another one")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {a.output} is a file; name a folder")
    dtype = None if a.dtype is None else parse_dtype(a.dtype)
    device = parse_device(a.device)
    set_threads(a.threads)
    stored = TORCH_DTYPES[inspect(a.model).tensors[EMBEDDING].dtype]
    model = load_model(a.model, dtype=parse_dtype(a.compute_dtype), device=device)
    state = state_of(model)
    if state is not None:
        raise ConfigError(
            f"--model: {a.model} is {state.stage} as {state.config.setting} already; give the"
            " full-precision model"
        )
    tokens = _tokens(a, model) if a.calibration else None
    with ExitStack() as stack:
        journal = _journal(a, config, model, tokens, stack)
        _apply(a, config, model, tokens, journal)
        # After the codes are made: they come from weights of the compute type. Parameters only: a
        # model-wide cast would round the rotary frequencies, which no checkpoint holds.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or stored)
        save_pretrained(model, output, tokenizer=a.model if has_tokenizer(a.model) else None)
        if journal is not None:
            journal.remove()
    result: dict[str, Any] = {
        "output": a.output,
        "method": a.method,
        "setting": config.setting if config is not None else None,
        "kv_mode": config.kv_mode if config is not None else None,
        "group_size": config.group_size if config is not None else None,
        "options": a.method_options(),
        "calibration": None
        if tokens is None
        else {
            "paths": a.calibration,
            "sequences": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "seed": a.seed or 0,
        },
        "total_bytes": sum(t.end - t.begin for t in inspect(output).tensors.values()),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if a.verify:
        result["verified"] = verify_export(model, output).to_dict()
    return result


def _tokens(arguments: QuantizeArguments, model: nn.Module) -> torch.Tensor:
    a = arguments
    given = {name: getattr(a, name) for name in ("sequences", "seq_len", "seed")}
    text = any(not Path(path).is_dir() for path in a.calibration)
    # A generated folder holds ids; a model without tokenizer can be calibrated on it.
    tokenizer = load_tokenizer(a.model) if text and has_tokenizer(a.model) else None
    return calibration_tokens(
        a.calibration,
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        **{name: value for name, value in given.items() if value is not None},
    )


def _journal(
    arguments: QuantizeArguments,
    config: QATConfig | None,
    model: nn.Module,
    tokens: torch.Tensor | None,
    stack: ExitStack,
) -> BlockJournal | None:
    """Beside the output, hidden: `.<name>.quantize`."""
    a, output = arguments, Path(arguments.output).resolve()
    if not METHODS[a.method].journaled:
        return None
    assert config is not None and tokens is not None
    identity = {
        "method": a.method,
        "options": a.method_options(),
        "compute_dtype": a.compute_dtype,
        "device": a.device,
        "inputs": fingerprint(model, tokens),
        **config.to_dict(),
    }
    folder = output.with_name(f".{output.name}.quantize")
    return stack.enter_context(BlockJournal(folder, identity, resume=a.resume))


def _apply(
    arguments: QuantizeArguments,
    config: QATConfig | None,
    model: nn.Module,
    tokens: torch.Tensor | None,
    journal: BlockJournal | None,
) -> None:
    a, options = arguments, arguments.method_options()
    if tokens is None:
        METHODS[a.method].run(model, config, **options)
    elif a.keep_float:
        smooth(model, tokens, progress=True, **options)
    else:
        extra = {} if journal is None else {"journal": journal}
        METHODS[a.method].run(model, config, tokens, progress=True, **extra, **options)


def run(arguments: QuantizeArguments, quantization: QuantArguments) -> None:
    """Print the result: a line for people, or one JSON object."""
    result = quantize(arguments, quantization.to_config())
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
        return
    done = result["setting"] or "smoothed, full precision"
    line = f"{result['output']}: {result['method']} {done}, {result['total_bytes'] / MIB:.1f} MiB"
    if result["calibration"] is not None:
        seen = result["calibration"]
        line += f", {seen['sequences']} x {seen['seq_len']} tokens seen"
    print(f"{line}, {result['seconds']:.1f} s")
    if "verified" in result:
        checked = result["verified"]
        print(
            f"verified: {checked['tensors']} tensors, {checked['elements']} elements and"
            f" {checked['logits']} logits equal"
        )
