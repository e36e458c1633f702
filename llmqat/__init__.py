"""LLM-QAT: data-free quantization-aware training of LLaMA-family models, from training to serving.

The river: ``generate-data`` -> ``train`` -> ``eval`` -> ``export`` -> ``generate``; the same from
Python:

>>> import llmqat
>>> config = llmqat.QATConfig.parse("4-8-4")  # weights 4, activations 8, KV cache 4 bits
"""

from __future__ import annotations

import os as _os
import sys as _sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# As in llmqat_kernels (which loads torch, so it cannot be asked here): OpenMP's waiting policy is
# read when torch loads.
if "torch" not in _sys.modules:
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from .checkpoint import from_pretrained, save_pretrained
    from .config import QATConfig
    from .convert import conversion_report, convert, prepare
    from .runtime.engine import Engine
    from .runtime.quantized_cache import QuantizedCache
    from .runtime.sampling import Sampling
    from .runtime.transformers_engine import TransformersEngine
    from .train.trainer import QATTrainer, training_arguments

__version__ = "0.1.0"

# Imported on first use: `import llmqat` must not cost the seconds that transformers takes, and the
# data
# store must work without torch.
_HOMES = {
    "QATConfig": "config",
    "prepare": "convert",
    "convert": "convert",
    "conversion_report": "convert",
    "save_pretrained": "checkpoint",
    "from_pretrained": "checkpoint",
    "Engine": "runtime.engine",
    "QuantizedCache": "runtime.quantized_cache",
    "Sampling": "runtime.sampling",
    "TransformersEngine": "runtime.transformers_engine",
    "QATTrainer": "train.trainer",
    "training_arguments": "train.trainer",
}

__all__ = [
    "Engine",
    "QATConfig",
    "QATTrainer",
    "QuantizedCache",
    "Sampling",
    "TransformersEngine",
    "conversion_report",
    "convert",
    "from_pretrained",
    "prepare",
    "save_pretrained",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmqat' has no attribute {name!r}")
    home = _HOMES[name]
    module = import_module(f"llmqat.{home}")
    # All names of the home at once: importing `llmqat.convert` has just bound the module to the
    # name of its function.
    globals().update({n: getattr(module, n) for n, place in _HOMES.items() if place == home})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
