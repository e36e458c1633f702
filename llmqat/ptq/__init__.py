"""Post-training quantization: a plain model to a packed one without whole-model training.

Each method takes a plain model and returns it converted, with codes and scales of the same grids as
quantization-aware training (docs/post-training.md); `smooth` alone returns a float model that
`prepare` can train.
"""

from llmqat.ptq.awq import awq
from llmqat.ptq.calibration import calibration_tokens
from llmqat.ptq.gptq import gptq
from llmqat.ptq.journal import BlockJournal
from llmqat.ptq.lorc import compensate, float_weights
from llmqat.ptq.rtn import rtn
from llmqat.ptq.smoothquant import smooth, smoothquant
from llmqat.ptq.zeroquant import zeroquant

__all__ = [
    "BlockJournal",
    "awq",
    "calibration_tokens",
    "compensate",
    "float_weights",
    "gptq",
    "rtn",
    "smooth",
    "smoothquant",
    "zeroquant",
]
