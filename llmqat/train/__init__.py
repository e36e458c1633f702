"""Quantization-aware training by distillation: trainer, losses, health metrics, resumption."""

from llmqat.train.health import HealthMonitor
from llmqat.train.losses import LOSSES
from llmqat.train.trainer import QATTrainer, training_arguments

__all__ = ["LOSSES", "HealthMonitor", "QATTrainer", "training_arguments"]
