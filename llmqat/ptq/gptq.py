"""GPTQ: round column after column, and let the columns to come make up for each error.

For one linear with inputs X the output error of weights W' is tr((W - W') H (W - W')^T) with
H = 2 X X^T / tokens. Column j is rounded to the grid; its error, divided by the diagonal of the
Cholesky factor U of H^-1 (U^T U = H^-1, upper), times row j of U is subtracted from the columns
behind it (Frantar et al. 2022, algorithm 1). The grid is that of the specification: symmetric,
scales of `row_scale` with their rounding to bfloat16, so codes and scales pack like any others.

Blocks are taken in order, and within a block q/k/v, o, gate/up, down: each sees the inputs that the
quantized part of the model in front of it really produces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmqat.config import QATConfig, QuantSpec
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError
from llmqat.nn.decided import DecidedLinear
from llmqat.ptq.calibration import TOKEN_LIMIT, BlockWalk, Gram
from llmqat.ptq.channels import input_groups
from llmqat.ptq.checks import check_count, check_fraction, check_plain, check_token_limit
from llmqat.ptq.journal import BlockJournal
from llmqat_kernels.spec.quantize import (
    group_scales,
    quantize_integer_groups,
    row_codes,
    row_scale,
)

__all__ = ["gptq", "gptq_codes"]


def gptq_codes(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block_columns: int = 128,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of one weight, chosen for the inputs that `gram` sums up.

    Args:
        weight: float [N, K].
        gram: float [K, K], a positive multiple of X^T X over inputs X [tokens, K].
        spec: bits, group size and scale precision. With groups, a group's scale comes from its
            columns as they stand when its first one is due; with `act_order`, from the columns of
            the original weight, since then a group's columns are not due together; with integer
            scales also, since those of a row are chosen together.
        damping: this part of the mean diagonal is added to the diagonal.
        act_order: take the columns by falling diagonal, the most used inputs first.
        block_columns: columns between updates of all the rest; speed only, up to rounding.

    Returns:
        int8 [N, K] in [-qmax, qmax], and fp32 [N] or [N, K / group_size].

    Raises:
        ConfigError: the damped matrix is not positive definite.
    """
    k = weight.shape[1]
    factor, order = _inverse_factor(gram, damping, act_order)
    work = weight.detach().float()
    bf16, group = spec.scale_dtype == "bfloat16", spec.group_size
    width = k if group == -1 else group
    if spec.integer_scales:
        _, multiplier, row = quantize_integer_groups(work, spec.bits, group)
        scale = group_scales(row, multiplier)
    else:
        scale = row_scale(work.unflatten(1, (k // width, width)), spec.bits, bf16)  # [N, groups]
    work = work[:, order].contiguous()
    codes = torch.empty_like(work, dtype=torch.int8)
    columns = order.tolist()
    dynamic = group != -1 and not act_order and not spec.integer_scales
    # A group may not begin inside the part of the weight that waits for its update.
    step = max(group, block_columns // group * group) if dynamic else block_columns
    for begin in range(0, k, step):
        end = min(begin + step, k)
        part, corner = work[:, begin:end].clone(), factor[begin:end, begin:end]
        errors = torch.zeros_like(part)
        for i in range(end - begin):
            column = columns[begin + i]
            if dynamic and column % group == 0:
                scale[:, column // group] = row_scale(part[:, i : i + group], spec.bits, bf16)
            step_size = scale[:, column // width]
            code = row_codes(part[:, i : i + 1], step_size, spec.bits)[:, 0]
            codes[:, begin + i] = code
            errors[:, i] = (part[:, i] - code.float() * step_size) / corner[i, i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * corner[i, i + 1 :]
        work[:, end:] -= errors @ factor[begin:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(k, device=order.device)
    return codes[:, back].contiguous(), scale[:, 0].contiguous() if group == -1 else scale


def _inverse_factor(gram: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse of the damped, ordered matrix: fp32 [K, K]; the order.

    A channel that was never used gets a diagonal of 1: its column is then rounded to nearest and
    has no part in the others' errors.
    """
    matrix = gram.double().clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    k = matrix.shape[0]
    order = torch.arange(k, device=matrix.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        matrix = matrix[order][:, order].contiguous()
    diagonal = matrix.diagonal()
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed) != 0:
        raise ConfigError(
            f"damping: {damping} leaves the inputs' matrix singular; use a larger one or more"
            " calibration tokens"
        )
    return upper.float(), order


def gptq(
    model: nn.Module,
    config: QATConfig,
    tokens: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block_columns: int = 128,
    token_limit: float = TOKEN_LIMIT,
    batch_size: int = 8,
    progress: bool = False,
    journal: BlockJournal | None = None,
) -> nn.Module:
    """Pack a plain model with codes chosen by GPTQ, in place.

    Args:
        tokens: int64 [n, T] calibration ids.
        damping, act_order, block_columns: as :func:`gptq_codes`.
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
    check_fraction("damping", damping, zero=False)
    check_count("block_columns", block_columns, 1)
    check_token_limit(token_limit)
    prepare(model, config)
    walk = BlockWalk(model, tokens, batch_size=batch_size, label="gptq" if progress else None)
    for index, name, block in walk:
        done = None if journal is None else journal.load(index)
        if done is not None:
            for short in walk.family.linears:
                tensors = (done[f"{short}.{part}"].to(walk.device) for part in ("codes", "scale"))
                DecidedLinear.decide(block.get_submodule(short), *tensors)
            walk.advance(block)
            continue
        results: dict[str, Tensor] = {}
        for group in input_groups(walk.family):
            first = group.linears[0]
            gram = Gram.of(walk.inputs(block, first), f"{name}.{first}", token_limit)
            linears = [block.get_submodule(short) for short in group.linears]
            # Rows do not interact, so linears with the same input are one matrix.
            codes, scale = gptq_codes(
                torch.cat([linear.weight for linear in linears]),
                gram.matrix,
                config.weight,
                damping=damping,
                act_order=act_order,
                block_columns=block_columns,
            )
            rows = [linear.out_features for linear in linears]
            parts = zip(group.linears, linears, codes.split(rows), scale.split(rows), strict=True)
            for short, linear, its_codes, its_scale in parts:
                its_codes, its_scale = its_codes.contiguous(), its_scale.contiguous()
                DecidedLinear.decide(linear, its_codes, its_scale)
                results |= {f"{short}.codes": its_codes, f"{short}.scale": its_scale}
        if journal is not None:
            journal.save(index, results)
        walk.advance(block)
    return convert(model)
