"""SmoothQuant: move the spread of activation channels into the weights, then round to nearest.

Activations are quantized with one scale per token, so one channel that is a hundred times larger
than the rest takes all the grid's points. For every input channel j of a linear

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        X_j <- X_j / s_j      W_j <- W_j * s_j

leaves the product as it was and shares the range between both (Xiao et al. 2023, Eq. 4). The
division is folded into the preceding norm, as in the paper, or also into the preceding linear
where that is exact. Statistics are of the float model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmqat.config import QATConfig
from llmqat.convert import convert
from llmqat.errors import ConfigError
from llmqat.models.families import find_family
from llmqat.nn.conv1d import row_weight
from llmqat.ptq.calibration import BlockWalk
from llmqat.ptq.channels import InputGroup, fold, foldable_groups, merge_heads
from llmqat.ptq.checks import check_fold, check_fraction, check_plain
from llmqat.ptq.keys import PairLengths, check_smoothable_keys, fold_keys, key_scale

__all__ = ["smooth", "smoothing_scale", "smoothquant"]


def smoothing_scale(input_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """`s` of every channel, fp32 [K], from largest magnitudes [K] of inputs and weight columns.

    A channel that is zero on either side has nothing to share: its scale is 1.
    """
    x, w = input_amax.float(), weight_amax.float()
    used = (x > 0) & (w > 0)
    one = torch.ones_like(x)
    x, w = torch.where(used, x, one), torch.where(used, w, one)
    return torch.where(used, x.pow(alpha) / w.pow(1 - alpha), one)


@torch.no_grad()
def smooth(
    model: nn.Module,
    tokens: Tensor,
    *,
    alpha: float = 0.5,
    folds: str = "norms",
    key_alpha: float = 0.0,
    batch_size: int = 8,
    progress: bool = False,
) -> nn.Module:
    """Migrate channel scales into the weights of a plain model, in place.

    The model stays a float model that computes the same function (to rounding); `prepare` may
    train it through quantization (LLM-QAT table 8), `convert` rounds it to nearest.

    Args:
        tokens: int64 [n, T] calibration ids.
        alpha: 0..1, how much of the spread goes to the weights.
        folds: "norms" (inputs of q/k/v and gate/up), "norms+down" (also down_proj, through the rows
            of up_proj) or "all" (also o_proj, through the rows of v_proj: this changes the values
            that a quantized KV cache holds), or "none".
        key_alpha: 0..1, how much the channels of K are evened out (see `keys`); 0 leaves them.

    Returns:
        The model.

    Raises:
        ConfigError: an unsupported or changed model, a bad option, non-finite activations.
        DataError: tokens that the model cannot take.
    """
    check_plain(model, None)
    check_fraction("alpha", alpha)
    check_fold(folds)
    check_fraction("key_alpha", key_alpha)
    if key_alpha:
        check_smoothable_keys(find_family(model))
    walk = BlockWalk(model, tokens, batch_size=batch_size, label="smooth" if progress else None)
    groups = foldable_groups(walk.family, folds)
    for _, name, block in walk:
        largest: dict[str, Tensor] = {}

        def observe(x: Tensor, key: str, largest: dict[str, Tensor] = largest) -> None:
            amax = x.detach().float().abs().amax(dim=tuple(range(x.dim() - 1)))
            largest[key] = torch.maximum(largest[key], amax) if key in largest else amax

        observers = {
            group.linears[0]: lambda x, key=group.linears[0]: observe(x, key) for group in groups
        }
        attention = block.get_submodule(walk.family.attention)
        keys = PairLengths(attention.k_proj, model.config) if key_alpha else None
        if keys is not None:
            observers[f"{walk.family.attention}.k_proj"] = keys.observe
        # The outputs of the block before it is changed: those of the float model, bit for bit.
        outputs = walk.run(block, observers)
        for group in groups:
            inputs = largest[group.linears[0]]
            if not bool(torch.isfinite(inputs).all()):
                raise ConfigError(
                    f"{name}.{group.linears[0]}: its calibration inputs hold NaN or infinite"
                    " values; check the model"
                )
            fold(block, group, _group_scale(block, group, inputs, alpha, model), model.config)
        if keys is not None and keys.largest is not None:
            fold_keys(attention, key_scale(keys.largest, key_alpha), model.config)
        walk.advance(block, outputs)
    return model


def _group_scale(
    block: nn.Module, group: InputGroup, inputs: Tensor, alpha: float, model: nn.Module
) -> Tensor:
    columns = torch.stack(
        [row_weight(block.get_submodule(name)).float().abs().amax(0) for name in group.linears]
    ).amax(0)
    if group.kind == "values":
        inputs = merge_heads(inputs, model.config).amax(0)
        columns = merge_heads(columns, model.config).amax(0)
    return smoothing_scale(inputs, columns, alpha)


def smoothquant(
    model: nn.Module,
    config: QATConfig,
    tokens: Tensor,
    *,
    alpha: float = 0.5,
    folds: str = "norms",
    key_alpha: float = 0.0,
    batch_size: int = 8,
    progress: bool = False,
) -> nn.Module:
    """:func:`smooth`, then round to nearest: a packed model, in place. Arguments as there."""
    check_plain(model, config)
    smooth(
        model,
        tokens,
        alpha=alpha,
        folds=folds,
        key_alpha=key_alpha,
        batch_size=batch_size,
        progress=progress,
    )
    return convert(model, config)
