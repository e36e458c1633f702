"""All flows, by name."""

from tests.device import drop_in, parity, serving, step_graph, training
from tests.device.registry import FLOWS

__all__ = ["FLOWS", "drop_in", "parity", "serving", "step_graph", "training"]
