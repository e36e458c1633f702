"""Quantization-aware training by distillation: trainer, losses, health metrics, resumption."""

from llmqat.train.health import HealthMonitor
from llmqat.train.losses import TERMS
from llmqat.train.trainer import QATTrainer, training_arguments

__all__ = ["TERMS", "HealthMonitor", "QATTrainer", "training_arguments"]
