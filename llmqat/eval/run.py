"""`llmqat eval` without its printing: perplexities and tasks of one model, as JSON values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.checkpoint.inspection import read_architecture
from llmqat.config import QATConfig
from llmqat.data.dataset import read_texts
from llmqat.errors import ConfigError
from llmqat.eval.arguments import EvalArguments
from llmqat.eval.models import LoadedModel, load_for_evaluation
from llmqat.eval.perplexity import encode_text_file, perplexity
from llmqat.eval.tasks import TaskSuite, averages, resolve_tasks_dir, task_names
from llmqat.eval.word_perplexity import word_perplexity
from llmqat.runtime.loading import load_tokenizer, parse_device, parse_dtype, set_threads
from llmqat.train.run import announce_backend

OFF = "16-16-16"
QUANTIZERS = (
    "w_quantizer",
    "a_quantizer",
    "kv_quantizer",
    "numerics",
    "a_group_size",
    "a_group_axis",
)
"""Fields of the configuration that one setting may differ in besides scales and KV mode."""


def evaluate(arguments: EvalArguments, config: QATConfig | None) -> dict[str, Any]:
    """Everything asked for, and everything needed to read it, as JSON values.

    Args:
        arguments: with `output`, the result is also written there, tasks one by one.
        config: see :func:`load_for_evaluation`.

    Raises:
        ConfigError: options contradict each other, the checkpoint or the file to resume.
        CheckpointError, DataError, InvalidArgument: unreadable model, text or task, or a window
            that does not fit.
    """
    a = arguments
    _check_output(a.output)
    device = parse_device(a.device)
    dtype = parse_dtype(a.dtype)
    set_threads(a.threads)
    # Before the model: a missing data set or a short context shows at once.
    suite = _suite(a)
    if suite is not None:
        suite.check_context(read_architecture(a.model).context, load_tokenizer(a.model))
    loaded = load_for_evaluation(
        a.model, config, method=a.method, options=a, dtype=dtype, device=device
    )
    _check_batches(a, loaded)
    announce_backend(device)
    tokenizer = load_tokenizer(a.model)
    result: dict[str, Any] = {
        "model": a.model,
        "setting": loaded.config.setting if loaded.config is not None else OFF,
        **{
            name: getattr(loaded.config, name) if loaded.config is not None else None
            for name in ("kv_mode", "group_size", "weight_scale_dtype", *QUANTIZERS)
        },
        "stage": loaded.stage,
        "method": a.method,
        "dtype": a.dtype,
        "device": device.type,
    }
    if a.rank is not None:
        result["rank"] = a.rank
    identity = _identity(a, loaded)
    done = _previous(a, identity)
    texts = [_measure(a, loaded.model, tokenizer, path) for path in a.text or ()]
    if len(texts) == 1:
        result |= texts[0]
    elif texts:
        result["texts"] = texts
    if suite is not None:
        result |= {"limit": a.limit, "tasks_dir": a.tasks_dir, "identity": identity}

        def keep(tasks: dict[str, Any], complete: bool = False) -> None:
            result.update(averages(tasks), tasks=dict(tasks), complete=complete)
            if a.output is not None:
                io.write_json(a.output, result)

        keep(
            suite.run(
                loaded.model,
                tokenizer,
                limit=a.limit,
                batch_size=a.batch_size,
                done=done,
                keep=keep,
            ),
            complete=True,
        )
    elif a.output is not None:
        io.write_json(a.output, result)
    return result


def _check_output(output: str | None) -> None:
    """Before hours of work: ConfigError if a result cannot be written there."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {path.absolute().parent}; make it first")


def _suite(a: EvalArguments) -> TaskSuite | None:
    if not a.tasks:
        return None
    folder = None if a.tasks_dir is None else resolve_tasks_dir(a.tasks_dir)
    return TaskSuite(task_names(a.tasks), folder=folder, shots=a.shots)


def _check_batches(a: EvalArguments, loaded: LoadedModel) -> None:
    """A scale over all tokens of a batch would depend on what else is in it."""
    config = loaded.config
    if (
        a.batch_size > 1
        and config is not None
        and config.a_group_size > 0
        and config.a_group_axis == "channel_over_tokens"
    ):
        raise ConfigError(
            f"--batch-size: {a.batch_size} would change the scales, which span all tokens of a"
            " batch (--a-group-axis channel_over_tokens); use 1"
        )


def _measure(a: EvalArguments, model: Any, tokenizer: Any, path: str) -> dict[str, Any]:
    """One text by the protocol asked for."""
    started = time.perf_counter()
    numbers: dict[str, Any]
    options: dict[str, Any] = {"max_tokens": a.max_tokens, "batch_size": a.batch_size}
    if a.protocol == "word":
        numbers = word_perplexity(
            model, tokenizer, read_texts(path), a.seq_len, **options
        ).to_dict()
    else:
        ids = encode_text_file(tokenizer, path)
        started = time.perf_counter()
        numbers = perplexity(model, ids, a.seq_len, **options).to_dict()
    seconds = time.perf_counter() - started
    return {
        "text": path,
        "protocol": a.protocol,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(numbers["tokens"] / seconds, 1),
    }


def _identity(a: EvalArguments, loaded: LoadedModel) -> dict[str, Any]:
    """What decides a task's numbers, besides its own shots and data."""
    files = sorted(Path(a.model).iterdir())
    stats = [(path.name, os.stat(path)) for path in files if path.is_file()]
    listing = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return {
        "model_files": hashlib.sha256(listing.encode()).hexdigest(),
        "quantization": None if loaded.config is None else loaded.config.to_dict(),
        "method": a.method,
        "method_options": None if a.method is None else a.method_options(a.method),
        "calibration": loaded.calibration,
        "dtype": a.dtype,
        "limit": a.limit,
        "tasks_dir": a.tasks_dir is not None,
    }


def _previous(a: EvalArguments, identity: dict[str, Any]) -> dict[str, Any]:
    """The tasks of `output`, if the run goes on with it."""
    if not a.resume or a.output is None or not Path(a.output).is_file():
        return {}
    try:
        old = json.loads(Path(a.output).read_text(encoding="utf-8"))
        before, tasks = old["identity"], old["tasks"]
        changed = sorted(name for name, value in identity.items() if before[name] != value)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--resume: {a.output} is no result of llmqat eval --tasks; leave --resume out"
        ) from error
    if changed:
        raise ConfigError(
            f"--resume: {a.output} was made with another {changed[0].replace('_', ' ')}; leave"
            " --resume out or name another --output"
        )
    return dict(tasks)
