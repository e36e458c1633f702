"""Following torch's autocast where the operators, which have fixed dtypes, do not know about it."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """x in the autocast dtype of its device, as `nn.Linear` would cast it; x itself without
    autocast.
    """
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return x
    if x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
