"""ZeroQuant: distil one quantized block after another, each on its own (LKD).

The teacher of block i is the same block in full precision, given the same inputs: what the
quantized blocks before it produce. Its quantized linears are trained through the straight-through
estimator for a few AdamW steps on the mean square difference of the outputs (Yao et al. 2022,
section 4.3). No labels, no whole-model backward, one block of optimizer state.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.nn.attention import MODULE_ATTRIBUTE
from llmqat.nn.linear import QATLinear, clear_weight_cache
from llmqat.ptq.calibration import TOKEN_LIMIT, BlockWalk, token_weights
from llmqat.ptq.checks import check_count, check_plain, check_positive, check_token_limit
from llmqat.ptq.journal import BlockJournal

__all__ = ["zeroquant"]


def zeroquant(
    model: nn.Module,
    config: QATConfig,
    tokens: Tensor,
    *,
    steps: int = 64,
    lr: float = 1e-4,
    seed: int = 0,
    token_limit: float = TOKEN_LIMIT,
    batch_size: int = 4,
    progress: bool = False,
    journal: BlockJournal | None = None,
) -> nn.Module:
    """Pack a plain model after layer-by-layer distillation, in place.

    Args:
        tokens: int64 [n, T] calibration ids.
        steps: AdamW steps per block, one batch each; the learning rate falls to 0 as a cosine. A
            block that is no better afterwards on all tokens is left as rounded to nearest.
        lr: peak learning rate.
        seed: order of the batches.
        token_limit: differences of tokens whose target is longer than this many times the median
            are weighted down as if it were that long; 0 is the method as published.
        batch_size: sequences per step and per forward pass.
        journal: where finished blocks are kept, and taken from.

    Returns:
        The model, converted. After an error it is half done: load it again.

    Raises:
        ConfigError: an unsupported or changed model, or a bad option.
        DataError: tokens that the model cannot take.
    """
    check_plain(model, config)
    check_count("steps", steps, 1)
    check_positive("lr", lr)
    check_count("seed", seed, 0)
    check_token_limit(token_limit)
    prepare(model, config)
    walk = BlockWalk(model, tokens, batch_size=batch_size, label="zeroquant" if progress else None)
    for index, _, block in walk:
        done = None if journal is None else journal.load(index)
        if done is not None:
            block.load_state_dict(done)
            walk.advance(block)
            continue
        targets = walk.run(_full_precision(block))
        weights = [token_weights(target, token_limit) for target in targets]
        outputs = walk.run(block)
        before = _difference(outputs, targets, weights)
        originals = {
            name: module.weight.detach().clone()
            for name, module in block.named_modules()
            if isinstance(module, QATLinear)
        }
        # The order of one block does not hang on how many blocks a resumed run skipped.
        order = torch.Generator().manual_seed(seed * 100_003 + index)
        _distil(walk, block, targets, weights, steps, lr, order)
        trained = walk.run(block)
        after = _difference(trained, targets, weights)
        # Not "after >= before": NaN must count as worse.
        if after < before:
            outputs = trained
        else:
            with torch.no_grad():
                for name, weight in originals.items():
                    block.get_submodule(name).weight.copy_(weight)
        walk.note(f"error {after / before if before else 1.0:.2f} of rtn")
        if journal is not None:
            journal.save(index, block.state_dict())
        walk.advance(block, outputs)
    return convert(model)


def _full_precision(block: nn.Module) -> nn.Module:
    """A copy of a prepared block that quantizes nothing."""
    teacher = copy.deepcopy(block)
    for module in teacher.modules():
        if isinstance(module, QATLinear):
            module.__class__ = module.PLAIN
        if hasattr(module, MODULE_ATTRIBUTE):
            delattr(module, MODULE_ATTRIBUTE)
    return teacher


def _difference(outputs: list[Tensor], targets: list[Tensor], weights: list[Tensor]) -> float:
    """Sum of squared weighted differences, fp64."""
    return sum(
        float(((a.double() - b.double()) * w).square().sum())
        for a, b, w in zip(outputs, targets, weights, strict=True)
    )


def _distil(
    walk: BlockWalk,
    block: nn.Module,
    targets: list[Tensor],
    token_weight: list[Tensor],
    steps: int,
    lr: float,
    order: torch.Generator,
) -> None:
    """Train the weights of the block's linears; every other parameter stays as it is."""
    wanted = {p: p.requires_grad for p in block.parameters()}
    block.requires_grad_(False)
    # Not `module.weight`: that of a Conv1D is a view of its parameter.
    weights = [
        dict(module.named_parameters(recurse=False))["weight"]
        for module in block.modules()
        if isinstance(module, QATLinear)
    ]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    batches: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            if not batches:
                batches = torch.randperm(len(targets), generator=order).tolist()
            at = batches.pop()
            for entry in optimizer.param_groups:
                entry["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            output = walk.call(block, walk.hidden[at])
            factor = token_weight[at].to(walk.device)
            target = targets[at].to(walk.device).float()
            loss = F.mse_loss(output.float() * factor, target * factor)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clear_weight_cache(block)
    for parameter, value in wanted.items():
        parameter.requires_grad_(value)
