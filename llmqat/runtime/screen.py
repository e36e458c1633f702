"""Greedy tokens from an 8-bit screen of the head: the tokens of the float head, for about half the
bytes of it a step.

The screen bounds every logit, so only rows that can hold the largest one are computed in full;
``csrc/cpu/screened_argmax.h`` has the proof. It costs ``n * K`` bytes beside the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import llmqat_kernels as qk

SCREEN_ROWS = 8192
"""Rows from which a screen pays: smaller heads stay in cache."""
CHUNK_ROWS = 4096
SMALLEST_NORM = 2.0**-60
"""Of a stored norm: what the proof takes for granted, far below any that matters."""
ROUND_UP = 1.0 + 2.0**-20
"""Above the roundings of a norm computed in fp64 and stored as fp32."""


@dataclass(frozen=True)
class HeadScreen:
    """8-bit codes of a head [n, K] in the backend's layout, and how far they are from it.

    ``scale`` fp32 [n] belongs to the codes; ``row_norms`` and ``error_norms`` fp32 [n] are upper
    bounds of the 2-norms of each head row and of its difference from the codes.
    """

    codes: Tensor
    scale: Tensor
    row_norms: Tensor
    error_norms: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and norms."""
        tensors = (self.codes, self.scale, self.row_norms, self.error_norms)
        return sum(t.nbytes for t in tensors)

    def greedy(self, hidden: Tensor, head: Tensor) -> Tensor:
        """The first index of the largest logit of each row of ``hidden`` [rows, K], int64 [rows];
        -1 where spec 16 has none. ``head``: the repacked float head.
        """
        tokens, _ = torch.ops.llmqat_cpu.screened_argmax.default(
            hidden,
            head,
            self.codes,
            self.scale,
            self.row_norms,
            self.error_norms,
            self.scale.shape[0],
        )
        return tokens  # type: ignore[no-any-return]


def _upper_norms(rows: Tensor) -> Tensor:
    """Upper bounds, fp32 [n], of the 2-norms of fp64 ``rows`` [n, K]."""
    return (rows.norm(dim=1) * ROUND_UP).clamp(min=SMALLEST_NORM).to(torch.float32)


def make_screen(head: Tensor) -> HeadScreen:
    """The screen of a float head [n, K] as stored, for the backend in force: ``cpu``."""
    codes, scale = qk.quantize(head, 8)
    norms, errors = [], []
    for first in range(0, head.shape[0], CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        rows = head[part].to(torch.float64)
        norms.append(_upper_norms(rows))
        errors.append(_upper_norms(rows - codes[part].double() * scale[part, None].double()))
    return HeadScreen(qk.repack_weight(codes, 8), scale, torch.cat(norms), torch.cat(errors))
