"""What the trainer's tests share: small runs, what they log, and a whole one."""

import copy
from pathlib import Path

import torch

from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.train import QATTrainer, training_arguments
from llmqat.train.metrics import read_metrics
from tests.llmqat.tiny import random_tokens, tiny_llama

CONFIG = QATConfig.parse("4-8-4", kv_mode="serving")


def token_rows(count=24, length=24, seed=1):
    return [{"input_ids": row} for row in random_tokens(seed, count, length)]


def build_trainer(
    folder, *, steps=8, student=None, teacher=None, data=None, config=CONFIG, **options
):
    teacher = teacher or tiny_llama(tied=True)
    student = student or prepare(copy.deepcopy(teacher), config)
    named = {
        name: options.pop(name)
        for name in (
            "loss",
            "loss_weights",
            "loss_layers",
            "chunk_size",
            "health_steps",
            "callbacks",
        )
        if name in options
    }
    settings = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = training_arguments(str(folder), max_steps=steps, **{**settings, **options})
    data = data or token_rows()
    return QATTrainer(student, arguments, data, teacher=teacher, **{"health_steps": 2, **named})


def logged(folder):
    """Everything logged except how long it took."""
    entries = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def assert_same_state(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b
