"""`QATTrainer`: transformers' Trainer with a teacher, a chunked loss and checkpoints to trust.

Optimizer, schedule, gradient accumulation, distributed wrapping, logging and the checkpoint files
are the library's. Ours are the loss, the health metrics, the record in `metrics.jsonl` and the
marker that makes a checkpoint trustworthy (`resume.py`). On a CPU a run that was killed and resumed
ends with the same weights, optimizer state and log as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from llmqat.errors import ConfigError
from llmqat.models.heads import last_hidden
from llmqat.train import resume, sharding
from llmqat.train.checks import check_data, check_pair, check_saved, check_student
from llmqat.train.health import HealthMonitor
from llmqat.train.losses import IGNORED_LABEL, Loss, LossInputs, find_loss
from llmqat.train.metrics import MetricsLog, TermMeans, read_metrics, write_curve
from llmqat.train.observe import BlockObserver, BlockState, parse_layers

__all__ = ["CURVE", "METRICS", "QATTrainer", "training_arguments"]

METRICS = "metrics.jsonl"
CURVE = "training_curve.csv"
SAVED_TOKENS, SAVED_PROBABILITIES = "teacher_tokens", "teacher_probabilities"
"""Keys of items that carry a saved teacher: int64 and float [T, k] (`PackedDataset.targets`)."""


def training_arguments(output_dir: str, **changes: Any) -> TrainingArguments:
    """The paper's settings (LLM-QAT section 3.1), with `changes` by their transformers names.

    AdamW without weight decay, lr 2e-5, cosine without warm-up, one epoch, gradient norm clipped at
    1, seed 42.
    """
    settings: dict[str, Any] = {
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "num_train_epochs": 1.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "optim": "adamw_torch_fused",  # the same update in one pass: 5x faster on a CPU
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a diverged run must show, and stop
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": 2000,
        "remove_unused_columns": False,
        "report_to": "none",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,  # every parameter is used, the head outside a forward
    }
    return TrainingArguments(output_dir=output_dir, **{**settings, **changes})


class QATTrainer(Trainer):
    """Trains a prepared student towards a teacher.

    Args:
        model: the prepared student with fp32 parameters (the master weights; `args.bf16` is
            autocast on top).
        args: see :func:`training_arguments`. `save_total_limit` counts complete checkpoints.
        train_dataset: items with `input_ids` [T] and optionally `attention_mask`, `position_ids`,
            `labels` [T]; with `teacher_tokens` and `teacher_probabilities` [T, k] they are the
            teacher.
        teacher: full-precision model with the same vocabulary, or None for a loss without one. It
            is put in evaluation mode, takes no gradient, is never part of the student and is never
            saved.
        loss, loss_weights: terms of `losses.TERMS` joined by "+", and their weights (1 each).
        loss_layers: decoder blocks that "hidden" and "attention" compare: "all", "last" or numbers.
        chunk_size: tokens whose logits exist at one time; None: a quarter of them, at most 1024.
        health_steps: steps between health reports; 0 for none.

    Raises:
        ConfigError: student not prepared or not in fp32, no plain head on either model, missing
            teacher, different vocabularies, no data, fp16, or several GPUs in one process.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset[dict[str, Tensor]],
        *,
        teacher: nn.Module | None = None,
        loss: str = "logits",
        loss_weights: Sequence[float] | None = None,
        loss_layers: str = "all",
        chunk_size: int | None = None,
        health_steps: int = 10,
        **options: Any,
    ) -> None:
        self.loss = find_loss(loss, loss_weights)
        layers = parse_layers(loss_layers)
        if (chunk_size is not None and chunk_size < 1) or health_steps < 0:
            raise ConfigError("chunk_size: must be at least 1; health_steps: at least 0")
        if args.fp16:
            raise ConfigError("dtype: float16 training is not supported; use float32 or bfloat16")
        if args.n_gpu > 1:
            raise ConfigError(
                "device: several GPUs in one process; use torchrun or CUDA_VISIBLE_DEVICES"
            )
        check_student(model)
        check_data(train_dataset, model)
        if not self.loss.needs_teacher:
            teacher = None
        elif SAVED_TOKENS in train_dataset[0]:
            check_saved(self.loss, teacher)
        elif teacher is None:
            raise ConfigError(f"teacher: loss {loss} needs one; give a model, or use loss label")
        else:
            check_pair(model, teacher)
        self._observers: list[BlockObserver] = []
        if teacher is not None and self.loss.watches():
            self._observers = _observe(self.loss, model, teacher, layers)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **options)
        # The loss is a mean over tokens: the Trainer itself has to divide by the number of micro-
        # batches.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher
        if self.teacher is not None:
            sharding.place_teacher(self.teacher.eval().requires_grad_(False), self.accelerator)
        if self._sharded:
            sharding.forget_codes(model)
        self.chunk_size = chunk_size
        self.health_steps = health_steps
        self.health = HealthMonitor(model)
        self._term_means = TermMeans()
        self.metrics_log = MetricsLog(Path(args.output_dir) / METRICS)
        self._compute_dtype = torch.bfloat16 if args.bf16 else torch.float32
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self.add_callback(_Schedule(self))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress)

    def create_accelerator_and_postprocess(self) -> None:
        """The library's accelerator, sharding fp32 masters where it shards."""
        sharding.allow_cpu()
        super().create_accelerator_and_postprocess()
        self._sharded = sharding.is_sharded(self.accelerator)
        if self._sharded:
            sharding.use_masters(self.accelerator)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, **options: Any
    ) -> TrainOutput:
        """Train; True resumes from the newest complete checkpoint, if any; a path from that one.

        Raises:
            CheckpointError: the named checkpoint is incomplete or altered.
            RuntimeError: the loss or the gradient norm is not finite.
        """
        if resume_from_checkpoint is True:
            output = Path(self.args.output_dir)
            newest = sharding.from_first(lambda: resume.newest_complete(output))
            resume_from_checkpoint = str(newest) if newest else None
        elif resume_from_checkpoint:
            resume.complete_or_raise(Path(resume_from_checkpoint))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)
        if self.is_world_process_zero():
            write_curve(read_metrics(self.metrics_log.path), Path(self.args.output_dir) / CURVE)
        return result

    def _run_epoch(self, *parts: Any, **options: Any) -> None:
        """One pass over the data, but for a run that was killed after its last step: the library
        would train a step more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*parts, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, fp32 []: mean over its valid tokens."""
        inputs = dict(inputs)
        input_ids, labels = inputs["input_ids"], inputs.pop("labels", None)
        saved = None
        if SAVED_TOKENS in inputs:
            saved = inputs.pop(SAVED_PROBABILITIES).float(), inputs.pop(SAVED_TOKENS)
        mask = inputs.get("attention_mask")
        labels = input_ids if labels is None else labels
        student = self.accelerator.unwrap_model(model)
        with (
            self.health.watch(self.is_health_step(self.state.global_step + 1)),
            self._watch(0) as student_blocks,
            # The library autocasts inside the model's own forward, except that of a sharded one.
            self.accelerator.autocast() if self._sharded else nullcontext(),
        ):
            hidden = last_hidden(model, inputs, student)
        teacher_hidden = teacher_head = None
        teacher_blocks: list[BlockState] = []
        if self.teacher is not None:
            with torch.no_grad(), self._watch(1) as teacher_blocks:
                teacher_hidden = last_hidden(self.teacher, inputs)
                teacher_head = sharding.head_weight(self.teacher.get_output_embeddings())
            teacher_hidden = teacher_hidden.to(teacher_head.dtype)
        loss, parts = self.loss.compute(
            LossInputs(
                student_hidden=hidden.to(self._compute_dtype),
                student_head=sharding.head_weight(student.get_output_embeddings()).to(
                    self._compute_dtype
                ),
                teacher_hidden=teacher_hidden,
                teacher_head=teacher_head,
                labels=labels if mask is None else labels.masked_fill(mask == 0, IGNORED_LABEL),
                valid=None if mask is None else mask.bool(),
                chunk_size=self.chunk_size,
                saved=saved,
                student_blocks=student_blocks,
                teacher_blocks=teacher_blocks,
            )
        )
        if len(parts) > 1 and model.training:
            self._term_means.add(parts)
        return (loss, {}) if return_outputs else loss

    def _watch(self, role: int) -> AbstractContextManager[list[BlockState]]:
        """The compared blocks of the student (0) or teacher (1) during a forward."""
        return self._observers[role].watch() if self._observers else nullcontext([])

    def is_health_step(self, step: int) -> bool:
        """Whether step `step` (from 1) reports health.

        Saved steps do, so that a resumed run counts flips from the same codes.
        """
        return self.health_steps > 0 and (step % self.health_steps == 0 or self._saves_after(step))

    def _saves_after(self, step: int) -> bool:
        return step % self.state.save_steps == 0 or step >= self.state.max_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step as usual, with health, and write it to `metrics.jsonl`."""
        step = self.state.global_step
        is_step = "loss" in logs
        if is_step:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(name, 0.0)):
                    raise RuntimeError(
                        f"{name} is {logs[name]} at step {step}; lower the learning rate"
                    )
            logs |= self._term_means.take(self.accelerator)
            if self.is_health_step(step):
                logs |= self.health.report()
        super().log(logs, start_time)
        if is_step and self.is_world_process_zero():
            seconds = round(self._seconds_before + time.monotonic() - self._started, 3)
            self.metrics_log.append(
                {"step": step, "tokens": self._tokens(step), **logs, "seconds": seconds}
            )

    def _tokens(self, step: int) -> int:
        """Tokens trained on after `step` steps of full batches of equal lengths."""
        assert self.train_dataset is not None
        per_step = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return step * per_step * len(self.train_dataset[0]["input_ids"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The library's checkpoint, then our marker, and only then the removal of older ones."""
        args = self.args
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            resume.unmark(folder)
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if args.should_save:
            resume.mark_complete(folder, self.state.global_step)
            rotate_checkpoints(output_dir=args.output_dir, save_total_limit=limit, use_mtime=False)


class _Schedule(TrainerCallback):
    """Ties logging, health and saving to the same steps: this run's, where a checkpoint was written
    with others.
    """

    def __init__(self, trainer: QATTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        state.compute_steps(args, state.max_steps)
        if trainer.health_steps:
            trainer.health.reset()
        if state.is_world_process_zero:
            trainer._seconds_before = trainer.metrics_log.rewind(state.global_step)
        trainer._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The running mean of the loss is not part of a checkpoint: it has to be empty when one is
        # written.
        if control.should_save or self._trainer.is_health_step(state.global_step):
            control.should_log = True


class _Progress(ProgressCallback):
    """The library's progress bar with the loss on it, instead of a printed line per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        bar: tqdm[Any] | None = self.training_bar
        if bar is not None and logs and "loss" in logs:
            bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)


def _observe(
    loss: Loss, student: nn.Module, teacher: nn.Module, layers: tuple[int, ...] | None
) -> list[BlockObserver]:
    watched = {"hidden": loss.watches("hidden"), "attention": loss.watches("query")}
    observers = [
        BlockObserver(role, model, layers, **watched)
        for role, model in (("student", student), ("teacher", teacher))
    ]
    own, other = map(len, observers)
    if own != other:
        raise ConfigError(
            f"loss: {loss.name} compares every block, but the student has {own} and the teacher"
            f" {other}; choose blocks with --loss-layers"
        )
    return observers
