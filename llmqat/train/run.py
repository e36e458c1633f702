"""One training run from folders to a folder: what `llmqat train` does.

The output folder holds the prepared student (readable by every later stage), `checkpoint-<step>`
folders, `metrics.jsonl`, `training_curve.csv` and `llmqat_run.json`, which says what was run and
whether it is finished.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import sys
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import llmqat_kernels
from llmqat import io
from llmqat.checkpoint import save_pretrained
from llmqat.checkpoint.format import CONFIG
from llmqat.checkpoint.save import finish_interrupted, interrupted
from llmqat.config import QATConfig
from llmqat.convert import prepare, state_of
from llmqat.data.dataset import PackedDataset
from llmqat.data.teacher import teacher_digest
from llmqat.data.teacher_logits import TeacherLogits
from llmqat.errors import CheckpointError, ConfigError
from llmqat.nn.linear import initialize_scales
from llmqat.runtime.loading import (
    has_tokenizer,
    load_model,
    load_tokenizer,
    parse_device,
    set_threads,
)
from llmqat.train import sharding
from llmqat.train.arguments import TrainArguments
from llmqat.train.metrics import read_metrics
from llmqat.train.trainer import METRICS, QATTrainer, training_arguments

__all__ = ["RUN_FILE", "announce_backend", "train"]

RUN_FILE = "llmqat_run.json"
_LOCK = ".llmqat-train.lock"
_RUNNING, _COMPLETE = "running", "complete"

logger = logging.getLogger(__name__)


def announce_backend(device: torch.device) -> None:
    """Say on stderr which operators a CUDA device runs as plain torch, for want of a kernel."""
    if device.type != "cuda":
        return
    choices = llmqat_kernels.choices("cuda")
    if slow := [choice.op for choice in choices if choice.backend == "reference"]:
        print(f"cuda: plain torch (slow) runs {', '.join(slow)}: no kernel", file=sys.stderr)


def load_plain(role: str, folder: str, dtype: torch.dtype) -> nn.Module:
    """A full-precision model; ConfigError if it is prepared or packed.

    In a process that does not read weights it has room for them, which costs nothing unwritten.
    """
    reads = sharding.reads_weights()
    model = load_model(folder, dtype=dtype, device=torch.device("cpu" if reads else "meta"))
    if not reads:
        sharding.reserve(model)
    state = state_of(model)
    if state is not None:
        raise ConfigError(
            f"--{role}: {folder} is {state.stage} ({state.config.setting});"
            " name a full-precision model"
        )
    return model


def train(arguments: TrainArguments, config: QATConfig) -> dict[str, Any]:
    """Run or resume a training; returns what `llmqat_run.json` says at its end.

    Of several processes (`accelerate launch`, `torchrun`) the first holds the lock, writes and
    returns the finished record; in the others it is still `running`.

    Raises:
        ConfigError: options that contradict each other or the run being resumed; a folder with
        another run. CheckpointError, DataError: unreadable model or data.
        RuntimeError: the loss is not finite.
    """
    device = parse_device(arguments.device)
    sharding.join(device)
    set_threads(arguments.threads)
    output = Path(arguments.output)
    with ExitStack() as lock:

        def open_run() -> dict[str, Any]:
            _check_output(output, arguments)
            for old in interrupted(output):
                with io.Lock(old / _LOCK):  # free, unless the run that is saving is alive
                    pass
            finish_interrupted(output)
            io.make_dir(output)
            lock.enter_context(io.Lock(output / _LOCK))
            return _open_record(output, arguments, config)

        record = sharding.from_first(open_run)
        if record["status"] == _COMPLETE:
            if sharding.is_first():
                logger.warning(
                    "%s is complete already (%s steps); nothing to do", output, record.get("steps")
                )
            return record
        if sharding.is_first():
            announce_backend(device)
        trainer = _build(arguments, config, device, record, output)
        if sharding.is_first():
            io.write_json(output / RUN_FILE, record)
        trainer.train(resume_from_checkpoint=arguments.resume)
        _finish(trainer, record, output, arguments.model)
        return record


_NAMED = ("model", "teacher", "data")
"""Options that name folders: what is in them has to be the same, not what they are called."""


def _check_output(output: Path, arguments: TrainArguments) -> None:
    """ConfigError if a student there would take the place of what the run reads, or of a model."""
    for name in _NAMED:
        source = getattr(arguments, name)
        if source is not None and Path(source).resolve() == output.resolve():
            raise ConfigError(f"--output: {output} is the folder of --{name}; name another one")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file; name a folder")
    runs = [folder / RUN_FILE for folder in (output, *interrupted(output))]
    if (output / CONFIG).exists() and not any(run.exists() for run in runs):
        raise ConfigError(f"--output: {output} holds a model already; name another folder")


def _digests(arguments: TrainArguments) -> dict[str, str | None]:
    """What the models of a run are, wherever they lie: the student's beginning and the teacher."""
    folders = {"model": arguments.model, "teacher": arguments.teacher}
    for name, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"--{name}: {folder} is not a folder; name a local model folder")
        if folder is not None and not (Path(folder) / CONFIG).is_file():
            raise ConfigError(f"--{name}: {folder} has no {CONFIG}; name a model folder")
    return {name: folder and teacher_digest(folder) for name, folder in folders.items()}


def _check_models(record: dict[str, Any], output: Path, arguments: TrainArguments) -> None:
    """ConfigError if a model of the run in `output` is another one now."""
    before = record["models"]
    for name, digest in _digests(arguments).items():
        if digest != before[name]:
            raise ConfigError(
                f"--{name}: {getattr(arguments, name)} is not the one that the run in {output}"
                " began with; resume with the same"
            )


def _open_record(output: Path, arguments: TrainArguments, config: QATConfig) -> dict[str, Any]:
    """The record of this run: the one in `output` when resuming, a new one otherwise."""
    path = output / RUN_FILE
    identity = {"arguments": arguments.identity(), "config": config.to_dict()}
    if not path.is_file():
        if any(output.glob("checkpoint-*")):
            raise ConfigError(
                f"--output: {output} has checkpoints but no {RUN_FILE}; choose an empty folder"
            )
        return {
            "format": 1,
            "command": "train",
            "status": _RUNNING,
            "processes": sharding.processes(),
            "models": _digests(arguments),
            **identity,
        }
    if not arguments.resume:
        raise ConfigError(
            f"--output: {output} holds a run already; go on with --resume, or choose another folder"
        )
    try:
        record = json.loads(path.read_bytes())
        before = {**record["arguments"], **record["config"]}
        record["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged; choose another folder") from error
    before = {**_defaults(), **before}
    by_content = "models" in record  # an older record knows paths only
    if by_content:
        _check_models(record, output, arguments)
    for name, value in {**identity["arguments"], **identity["config"]}.items():
        if by_content and name in _NAMED:
            continue
        if name not in before or before[name] != value:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--{option}: {value!r}, but the run in {output} has {before.get(name)!r};"
                " resume with the same options"
            )
    started_with = record.get("processes", 1)
    if record["status"] != _COMPLETE and started_with != sharding.processes():
        raise ConfigError(
            f"--output: the run in {output} has {started_with} processes, which decides its"
            f" batches; resume with as many, not {sharding.processes()}"
        )
    return dict(record)


def _defaults() -> dict[str, Any]:
    """What an option means in a record that was written before the option existed."""
    fields = (*dataclasses.fields(TrainArguments), *dataclasses.fields(QATConfig))
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _build(
    arguments: TrainArguments,
    config: QATConfig,
    device: torch.device,
    record: dict[str, Any],
    output: Path,
) -> QATTrainer:
    student = load_plain("model", arguments.model, torch.float32)
    vocab = student.get_input_embeddings().num_embeddings
    positions = student.config.max_position_embeddings
    if arguments.seq_len > positions:
        raise ConfigError(
            f"--seq-len: the model has {positions} positions, got {arguments.seq_len}"
        )
    is_text = not Path(arguments.data).is_dir()
    tokenizer = load_tokenizer(arguments.model) if is_text else None
    saved = _saved_teacher(arguments, vocab) if arguments.teacher_logits else None
    data = PackedDataset.from_path(
        arguments.data,
        arguments.seq_len,
        seed=arguments.seed,
        tokenizer=tokenizer,
        vocab_size=vocab,
        # The saved teacher saw every record alone: the student has to see no other one either.
        position_ids=saved is not None,
        targets=saved,
    )
    if (
        record.setdefault(
            "data", {"tokens": data.tokens, "sequences": len(data), "sha256": data.fingerprint}
        )["sha256"]
        != data.fingerprint
    ):
        raise ConfigError(
            f"--data: {arguments.data} has changed since the run began; start in another folder"
        )
    record["versions"] = _versions()
    settings = arguments.to_trainer(use_cpu=device.type == "cpu", report_to=_tracker())
    prepare(student, config, fused=arguments.fused)
    if config.a_quantizer == "lsq" and sharding.reads_weights():
        initialize_scales(student, torch.as_tensor(data[0]["input_ids"]).unsqueeze(0))
    teacher = None
    loss = arguments.to_loss()
    if loss.needs_teacher and saved is None:
        dtype = getattr(torch, arguments.dtype)
        teacher = load_plain("teacher", arguments.teacher or arguments.model, dtype)
    return QATTrainer(
        student,
        training_arguments(str(output), **settings),
        data,
        teacher=teacher,
        loss=loss.name,
        loss_weights=loss.weights,
        loss_layers=arguments.loss_layers,
        chunk_size=arguments.chunk_size,
        health_steps=arguments.health_steps,
    )


def _saved_teacher(arguments: TrainArguments, vocab_size: int) -> TeacherLogits:
    if not Path(arguments.data).is_dir():
        raise ConfigError(
            f"--teacher-logits: --data {arguments.data} is a file; name a folder of generated"
            " records"
        )
    saved = TeacherLogits(arguments.data)
    saved.check(vocab_size, teacher_digest(arguments.teacher) if arguments.teacher else None)
    return saved


def _finish(trainer: QATTrainer, record: dict[str, Any], output: Path, model_folder: str) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharding.gather(model)
    if not trainer.is_world_process_zero():
        return
    tokenizer = model_folder if has_tokenizer(model_folder) else None
    save_pretrained(model.eval(), output, tokenizer=tokenizer)
    entries = read_metrics(output / METRICS)
    first, last = entries[0], entries[-1]  # the last step is always logged
    record.update(
        status=_COMPLETE,
        steps=trainer.state.global_step,
        loss={"first": first["loss"], "last": last["loss"]},
        seconds=last["seconds"],
    )
    io.write_json(output / RUN_FILE, record)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate")
    return {
        "python": platform.python_version(),
        "llmqat_kernels": llmqat_kernels.__version__,
        "spec": llmqat_kernels.SPEC_VERSION,
        **{name: version(name) for name in packages},
    }


def _tracker() -> str:
    if find_spec("tensorboard") is not None:
        return "tensorboard"
    logger.warning("tensorboard is not installed: metrics go to %s only", METRICS)
    return "none"
