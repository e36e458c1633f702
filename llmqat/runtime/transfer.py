"""Numbers between host and device without waiting for the device: on CUDA from and to pinned
memory, in stream order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` (numbers, or rows of numbers) as a tensor on ``device``."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def download(values: Tensor) -> Callable[[], list[int]]:
    """Start to copy ``values``, int64 [n]; the result waits for the copy alone and gives them.

    ``values`` may be overwritten by later work of the same stream.
    """
    if values.device.type != "cuda":
        return values.clone().tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))
    return partial(_wait, copied, host)


def _wait(copied: torch.cuda.Event, host: Tensor) -> list[int]:
    copied.synchronize()
    return host.tolist()  # type: ignore[no-any-return]
