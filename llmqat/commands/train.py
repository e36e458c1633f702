"""`llmqat train`: quantization-aware training by distillation from the full-precision model."""

from __future__ import annotations

import sys

from transformers.utils import logging as transformers_logging

from llmqat.errors import ConfigError
from llmqat.train import sharding
from llmqat.train.arguments import QuantArguments, TrainArguments
from llmqat.train.run import train

ARGUMENTS = (TrainArguments, QuantArguments)


def run(arguments: TrainArguments, quantization: QuantArguments) -> None:
    """Train, and say in one line what came out."""
    config = quantization.to_config()
    if config is None:
        raise ConfigError("--bits: say what to quantize, for example --bits 4-8-4")
    # The library draws a bar for every file it writes; the bar of the steps is the one to watch.
    transformers_logging.disable_progress_bar()
    record = train(arguments, config)
    if not sharding.is_first():
        return
    loss = record["loss"]
    print(
        f"trained {config.setting} ({config.kv_mode}): {record['steps']} steps in"
        f" {record['seconds']:.0f} s, loss {loss['first']:.4f} -> {loss['last']:.4f},"
        f" written to {arguments.output}",
        file=sys.stderr,
    )
