"""Running models token by token: the engine (weights, KV cache, batched steps), sampling and
continuous slots.
"""

from llmqat.runtime.engine import Engine
from llmqat.runtime.sampling import Sampling
from llmqat.runtime.scheduler import Completion, Request, run_requests

__all__ = ["Completion", "Engine", "Request", "Sampling", "run_requests"]
