"""Modules of prepared and converted models; they call `llmqat_kernels` and hold no formula of their
own.
"""

from llmqat.nn.attention import KVQuantizer
from llmqat.nn.linear import LinearSpec, QATLinear, clear_weight_cache
from llmqat.nn.quantized_linear import QuantizedLinear

__all__ = ["KVQuantizer", "LinearSpec", "QATLinear", "QuantizedLinear", "clear_weight_cache"]
