"""AWQ: enlarge the weight columns of the most used input channels before rounding to nearest.

The error of a rounded weight does not depend on its size, so a column that is multiplied by s (and
its input divided by s) is rounded s times finer. For the linears of a block that share an input,

    s_j = m_j^ratio, m_j = mean|X_j|, divided by sqrt(max s * min s)

and `ratio` is the one of a grid over [0, 1) with the smallest error of the linears' outputs on the
calibration tokens (Lin et al. 2023, Eq. 4, 5). Ratio 0 is round-to-nearest, so the measured error
never grows. The error counts the weights' rounding only, not the activations'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.models.families import find_family
from llmqat.nn.linear import LinearSpec
from llmqat.nn.quantizers import fake_quantize
from llmqat.ptq.calibration import TOKEN_LIMIT, BlockWalk, Gram
from llmqat.ptq.channels import fold, foldable_groups, merge_heads, spread_heads, widest_folds
from llmqat.ptq.checks import check_count, check_fold, check_plain, check_token_limit
from llmqat.ptq.journal import BlockJournal

__all__ = ["awq", "output_error", "search_scale"]

SMALLEST = 1e-4
"""Relative importance and scales are kept above this: a channel that is never used has none."""


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Sum of squared output differences, sum_x |(weight - other) x|^2, from `gram` = sum x x^T.

    Args:
        weight, other: float [N, K]. gram: float [K, K].
    """
    difference = (weight - other).float()
    return float(((difference @ gram.float()) * difference).sum(dtype=torch.float64))


def channel_scale(importance: Tensor, ratio: float) -> Tensor:
    """`s` of every channel, fp32 [K], geometric middle of its extremes 1."""
    relative = importance.float() / importance.max().clamp_min(torch.finfo(torch.float32).tiny)
    scale = relative.clamp_min(SMALLEST).pow(ratio)
    return scale / torch.sqrt(scale.max() * scale.min())


@torch.no_grad()
def search_scale(
    weights: list[Tensor],
    gram: Tensor,
    importance: Tensor,
    spec: LinearSpec,
    *,
    grid: int = 20,
    spread: object = None,
) -> tuple[Tensor, float, float]:
    """The best scale of a group of linears that share an input.

    Args:
        weights: float [N_i, K] each.
        gram: float [K, K].
        importance: mean |x| of every channel that is free to scale.
        grid: ratios 0, 1/grid, ... below 1.
        spread: the model's config, where `importance` is of KV channels that several heads share.

    Returns:
        The scale, and the error after and before.
    """
    best: tuple[Tensor, float] | None = None
    before = 0.0
    for step in range(grid):
        scale = channel_scale(importance, step / grid)
        columns = scale if spread is None else spread_heads(scale, spread)
        error = 0.0
        for weight in weights:
            rounded = fake_quantize(weight.float() * columns, spec.weight)
            error += output_error(weight, rounded / columns, gram)
        before = error if step == 0 else before
        if best is None or error < best[1]:
            best = (scale, error)
    assert best is not None
    return best[0], best[1], before


@torch.no_grad()
def awq(
    model: nn.Module,
    config: QATConfig,
    tokens: Tensor,
    *,
    grid: int = 20,
    folds: str | None = None,
    token_limit: float = TOKEN_LIMIT,
    batch_size: int = 8,
    progress: bool = False,
    journal: BlockJournal | None = None,
) -> nn.Module:
    """Pack a plain model with activation-aware channel scales, in place.

    Args:
        tokens: int64 [n, T] calibration ids.
        grid: ratios tried per group of linears.
        folds: as `smooth`; by default "all", or "norms+down" where the KV cache is quantized:
            scales in the rows of v_proj would change what the cache holds. "norms" in a family
            that has nothing wider (GPT-2).
        token_limit: inputs longer than this many times the median count as of that length, so
            that a few attention sinks do not decide alone; 0 is the method as published.
        journal: where finished blocks are kept, and taken from.

    Returns:
        The model, converted. After an error it is half done: load it again.

    Raises:
        ConfigError: an unsupported or changed model, a bad option, non-finite activations.
        DataError: tokens that the model cannot take.
    """
    check_plain(model, config)
    check_count("grid", grid, 1)
    if folds is None:
        folds = widest_folds(find_family(model), "norms+down" if config.kv.enabled else "all")
    check_fold(folds)
    check_token_limit(token_limit)
    prepare(model, config)
    walk = BlockWalk(model, tokens, batch_size=batch_size, label="awq" if progress else None)
    groups = foldable_groups(walk.family, folds)
    for index, name, block in walk:
        done = None if journal is None else journal.load(index)
        if done is not None:
            block.load_state_dict(done)
            walk.advance(block)
            continue
        after = before = 0.0
        for group in groups:
            first = group.linears[0]
            gram = Gram.of(walk.inputs(block, first), f"{name}.{first}", token_limit)
            linears = [block.get_submodule(short) for short in group.linears]
            shared = group.kind == "values"
            importance = gram.mean_magnitude
            scale, error, plain = search_scale(
                [linear.weight for linear in linears],
                gram.matrix,
                merge_heads(importance, model.config).mean(0) if shared else importance,
                linears[0].spec,
                grid=grid,
                spread=model.config if shared else None,
            )
            fold(block, group, scale, model.config)
            after, before = after + error, before + plain
        walk.note(f"error {after / before if before else 1.0:.2f} of rtn")
        if journal is not None:
            journal.save(index, block.state_dict())
        walk.advance(block)
    return convert(model)
