"""Checkpoints of the paper's released code, packed with the codes that code computed.

Such a checkpoint is a plain LLaMA in bfloat16: the weights behind the codes, as its training left
them. The codes come from its own arithmetic (spec 23: everything in bfloat16, an inverted scale,
two small constants), which at 8 bits gives 128 in about one row of six. No int8 grid of [-127, 127]
holds that: it becomes 127, and is counted. Its weights of 2 bits lie on another grid (StatsQ, which
has no zero) and are refused.

The scale of a row is the reciprocal, in fp32, of what that code divides its codes by. So codes
times scale are its weights before their last rounding to bfloat16. Activations, keys and values are
quantized when the model runs, by this project's arithmetic (spec 3, 4).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from llmqat.config import OFFICIAL_STATSQ_BITS, QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_linears
from llmqat.nn.decided import DecidedLinear
from llmqat.state import state_of
from llmqat_kernels.spec.official import SYMMETRIC_EPSILON, official_codes
from llmqat_kernels.spec.quantize import qmax

__all__ = ["ReleasedReport", "import_released", "released_codes"]


def _check_grid(bits: int) -> None:
    if bits == OFFICIAL_STATSQ_BITS:
        raise ConfigError(
            f"w_bits: the released code quantizes weights of {bits} bits by StatsQ, to the values"
            " -3, -1, 1, 3 of a quarter of their range, and packed codes are -1, 0, 1; evaluate it"
            f" unpacked: llmqat eval --numerics official --bits {bits}-..."
        )


@dataclass(frozen=True)
class ReleasedReport:
    """What was packed: weights and rows in all, codes beyond the grid that were clamped, and the
    rows they are in.
    """

    weights: int
    rows: int
    clamped_codes: int
    clamped_rows: int

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)


def released_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what was clamped, of one weight of a released checkpoint.

    Args:
        weight: float [N, K]. Its arithmetic is bfloat16 where that holds every weight (the released
            code trains in nothing else), otherwise that of its own type.
        bits: 3..8.

    Returns:
        int8 [N, K] in [-qmax, qmax]; fp32 [N]; and int64 [N], the codes of each row that were
        beyond the grid.

    Raises:
        ConfigError: 2 bits, whose values the packed grid does not have.
    """
    _check_grid(bits)
    half = weight.detach().to(torch.bfloat16)
    own = half if torch.equal(half.to(weight.dtype), weight) else weight.detach()
    codes, inverted = official_codes(own, bits)
    limit = qmax(bits)
    beyond = (codes.abs() > limit).sum(-1)
    divisor = (inverted + SYMMETRIC_EPSILON)[:, 0].float()
    scale = torch.div(torch.ones_like(divisor), divisor)
    # A row of zeros: any scale will do, and spec 2 takes 1.
    scale = torch.where(own.abs().amax(-1) > 0, scale, torch.ones_like(scale))
    return codes.float().nan_to_num(0.0).clamp(-limit, limit).to(torch.int8), scale, beyond


def import_released(model: nn.Module, config: QATConfig) -> ReleasedReport:
    """Pack a plain model with the codes of the released code, in place.

    Args:
        model: a LLaMA as that code saved it.
        config: the bits it was trained with, whole rows, and `kv_mode` paper (where that code
            quantizes K and V). Scales are kept in fp32 whatever it says.

    Raises:
        ConfigError: not a plain LLaMA, settings that code has not, weights of 2 bits, or non-finite
            weights.
    """
    family = find_family(model)
    if family.name != "llama":
        raise ConfigError(f"model: {family.architecture} was not trained by the released code")
    if state_of(model) is not None:
        raise ConfigError("model: prepared or packed by this project; export it without --released")
    if config.group_size != -1:
        raise ConfigError(
            f"group_size: {config.group_size} is not what the released code does; use -1"
        )
    config = replace(config, weight_scale_dtype="float32")
    config.check_packable()
    _check_grid(config.w_bits)
    for name, _, module in iter_linears(model, family):
        if not bool(torch.isfinite(module.weight).all()):
            raise ConfigError(f"{name}: weight has NaN or infinite values; it cannot be packed")
    prepare(model, config)
    weights = rows = clamped_codes = clamped_rows = 0
    for _, _, module in iter_linears(model, family):
        codes, scale, beyond = released_codes(module.weight, config.w_bits)
        DecidedLinear.decide(module, codes, scale)
        weights, rows = weights + codes.numel(), rows + codes.shape[0]
        clamped_codes += int(beyond.sum())
        clamped_rows += int((beyond > 0).sum())
    convert(model)
    return ReleasedReport(weights, rows, clamped_codes, clamped_rows)
