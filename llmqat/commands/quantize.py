"""``llmqat quantize``: a packed checkpoint of a full-precision model by a post-training method."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmqat.checkpoint import save_pretrained, verify_export
from llmqat.checkpoint.format import TORCH_DTYPES
from llmqat.checkpoint.inspection import inspect
from llmqat.checkpoint.save import check_replaceable
from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.ptq import BlockJournal, smooth
from llmqat.ptq.calibration import fingerprint
from llmqat.ptq.methods import METHODS, MethodOptions
from llmqat.runtime.loading import (
    has_tokenizer,
    load_model,
    parse_device,
    parse_dtype,
    set_threads,
)
from llmqat.state import state_of
from llmqat.train.arguments import QuantArguments

MIB = 2**20


def _option(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass(kw_only=True)
class QuantizeArguments(MethodOptions):
    """Options of ``llmqat quantize``; None is the method's own default."""

    model: str = field(metadata={"help": "Folder of a full-precision model."})
    output: str = field(metadata={"help": "Folder of the packed checkpoint."})
    method: str = field(metadata={"help": "rtn, smoothquant, gptq, awq or zeroquant."})
    seq_len: int | None = _option("Tokens per calibration sequence; default 512.")
    batch_size: int | None = _option("Calibration sequences per pass; default 8, zeroquant 4.")
    keep_float: bool = field(
        default=False,
        metadata={
            "help": "smoothquant: write the smoothed float model (for llmqat train), unpacked."
        },
    )
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
        self.check_options(self.method)
        if self.rank is not None:
            raise ConfigError(
                "--rank: low-rank factors have no packed form; measure them with llmqat eval"
                f" --method {self.method} --rank {self.rank}"
            )
        if self.resume and not METHODS[self.method].journaled:
            raise ConfigError(f"--resume: --method {self.method} has nothing to go on from")


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
    if not a.keep_float:  # the earlier result of --keep-float is a full-precision model itself
        check_replaceable(output)
    dtype = None if a.dtype is None else parse_dtype(a.dtype)
    compute_dtype = parse_dtype(a.compute_dtype, "--compute-dtype")
    device = parse_device(a.device)
    set_threads(a.threads)
    checkpoint = inspect(a.model)
    stored = TORCH_DTYPES[checkpoint.tensors[checkpoint.arch.embedding].dtype]
    model = load_model(a.model, dtype=compute_dtype, device=device)
    state = state_of(model)
    if state is not None:
        raise ConfigError(
            f"--model: {a.model} is {state.stage} as {state.config.setting} already; give the"
            " full-precision model"
        )
    tokens = a.tokens(model, a.model)
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
        **{
            name: getattr(config, name) if config is not None else None
            for name in ("kv_mode", "group_size", "weight_scale_dtype")
        },
        "options": a.method_options(a.method),
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
        "options": a.method_options(a.method),
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
    a, options = arguments, arguments.method_options(arguments.method)
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
