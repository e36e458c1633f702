"""Which code of the CUDA kernels a call reaches, by the heuristics that cut its work.

``paths`` names what a case runs: the instance of a kernel's template, and what its blocks of
threads meet. ``test_cuda_cases.py`` lists what the cases must reach together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmqat_kernels import _host as host
from tests.kernels.cuda_calls import Case

LAUNCH_TOKENS = 64
"""kLinearTokens: more tokens are more launches."""
BLOCK_WARPS = 4
"""kLinearTiles: each has a tile of 32 channels and 128 k a stage, or they share a tile's k."""
RESIDENT = 3
"""Blocks of a linear for few tokens that fit on a multiprocessor."""
FRAGMENT_HEADS = 8
"""kAttentionHeadRows: query heads of one block and cached head."""
KEPT_VECTORS = 4
"""kHeld of quantize.cu, kAppendHeld of rope_quantize_append.cu."""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CODES = {torch.uint8: "int4", torch.int8: "int8"}

Paths = set[str]


def _launches(m: int) -> list[int]:
    return [min(LAUNCH_TOKENS, m - first) for first in range(0, m, LAUNCH_TOKENS)]


def _product(
    m: int, n: int, k: int, nibbles: bool, sms: int, floats: torch.dtype | None = None
) -> Paths:
    """integer_linear or float_linear."""
    if m == 0:
        return {"no token"}
    k_blocks = max(1, -(-k // 128))
    launches = _launches(m)
    found: Paths = set()
    if len(launches) > 1:
        found.add("two launches")
    if k * (1 if floats is None else 2) % 16:
        found.add("rows of no whole 16 bytes")
    for rows in launches:
        columns = host.linear_token_tiles(rows)
        ways = host.linear_ways(columns) if floats is None else 1
        groups = -(-n // (32 * BLOCK_WARPS // ways))
        if floats is None:
            events = _shares(groups, -(-k_blocks // ways), nibbles, columns, sms)
            kernel = "W4" if nibbles else "W8"
        else:
            splits = host.linear_float_splits(groups, -(-k_blocks // 2), sms)
            events = {"split" if splits > 1 else "whole"}
            kernel = NAMES[floats]
        if k_blocks % ways:
            events.add("a stage that is not full")
        if floats is not None and k_blocks % 2:
            events.add("stages that are not even")
        if groups > 1:
            events.add("two groups")
        found |= {f"{kernel} x{columns}: {event}" for event in events}
    return found


def portions(plan: tuple[int, int, int], stages: int) -> list[list[tuple[int, int, int]]]:
    """What each block of an integer linear does, one after another: group, first stage, stages.

    As LinearWalk of quantized_linear.cu, from the plan of the heuristics.
    """
    blocks, whole, cut = plan
    each, more = divmod(cut * stages, blocks)
    found = []
    for block in range(blocks):
        at = each * block + min(block, more)
        end = at + each + (block < more)
        mine = []
        while at < end:
            count = min(stages - at % stages, end - at)
            mine.append((at // stages, at % stages, count))
            at += count
        own = range(cut + block * whole, cut + (block + 1) * whole)
        found.append(mine + [(group, 0, stages) for group in own])
    return found


def _shares(groups: int, stages: int, nibbles: bool, columns: int, sms: int) -> Paths:
    """What the blocks of an integer linear do with so many groups."""
    per_sm = host.linear_blocks_per_sm(columns, RESIDENT)
    plan = host.linear_plan(groups, stages, 8192 if nibbles else 16384, sms, per_sm)
    found: Paths = set()
    for block in portions(plan, stages):
        shared = [count < stages for _, _, count in block]
        if any(shared):
            found.add("shared group")
        if len(block) > 1:
            found.add("next group")
        if any(shared) and not all(shared):
            found.add("shared, then whole")
    return found


def _repacked_matmul(case: Case, sms: int) -> Paths:
    a, _, _, _, bias, n, bits, _, dtype = case.args
    found = _product(a[..., 0].numel(), n, a.shape[-1], bits <= 4, sms)
    return found | {f"to {NAMES[dtype]}", f"bias {NAMES[bias.dtype] if bias is not None else None}"}


def _silu_mul(case: Case, sms: int) -> Paths:
    return {f"silu {path}" for path in _repacked_matmul(case, sms)}


def _repacked_matmul_add(case: Case, sms: int) -> Paths:
    a, residual, n, bits = case.args[0], *case.args[5:8]
    return {f"sum {NAMES[residual.dtype]}"} | _product(len(a), n, a.shape[-1], bits <= 4, sms)


def _repacked_linear_add(case: Case, sms: int) -> Paths:
    x, n = case.args[0], case.args[5]
    return _product(len(x), n, x.shape[-1], True, sms, x.dtype)


def _repacked_linear(case: Case, sms: int) -> Paths:
    x, n = case.args[0], case.args[4]
    return _product(len(x), n, x.shape[-1], True, sms, x.dtype)


def _quantized_matmul(case: Case, sms: int) -> Paths:
    a, _, w = case.args[:3]
    return {f"w {CODES[w.dtype]}"} | _product(
        len(a), len(w), a.shape[-1], w.dtype == torch.uint8, sms
    )


def _quantized_linear(case: Case, sms: int) -> Paths:
    x, w = case.args[:2]
    bits = f"a{case.args[5]} w {CODES[w.dtype]}"
    if case.args[5] < 16:
        m, k, nibbles = x[..., 0].numel(), x.shape[-1], w.dtype == torch.uint8
        return {bits} | _product(m, len(w), k, nibbles, sms)
    return {bits} | _product(x[..., 0].numel(), len(w), x.shape[-1], True, sms, x.dtype)


def _integer_groups(case: Case, sms: int) -> Paths:
    a, _, w, multiplier, _, _, group_size, _ = case.args
    m, n, k = len(a), len(w), multiplier.shape[1] * group_size
    tokens, splits, tiles, _ = host.int4_plan(m, n, k, group_size % 64 == 0, sms)
    if tokens == 0:
        return {"any layout"}
    segment = 128 if group_size % 128 == 0 else 64
    cut = "split" if splits > 1 else "whole"
    found = {f"{tokens} tokens, {CODES[a.dtype]}, groups of {segment}: {cut}"}
    if m > tokens:
        found.add("two token tiles")
    if tiles > -(-m // tokens):
        found.add("two channel tiles")
    return found


def _rows(columns: int, dtype: torch.dtype, threads: Callable[[int, int], int]) -> Paths:
    """How a block of threads reads a row of an aligned tensor."""
    widest = 16 // dtype.itemsize
    vector = widest if columns % widest == 0 else 1
    count = threads(columns, vector)
    found = {"vectors" if vector > 1 else "values", "warp" if count == 32 else "block"}
    if -(-columns // vector) > KEPT_VECTORS * count:
        found.add("beyond the registers")
    return {f"{NAMES[dtype]}: {each}" for each in found}


def _quantize(case: Case, sms: int) -> Paths:
    x = case.args[0]
    if x.numel() == 0:
        return {"no row"}
    columns = case.args[2] if len(case.args) > 2 else x.shape[-1]
    return _rows(columns, x.dtype, host.quantize_threads)


def _repack_weight(case: Case, sms: int) -> Paths:
    w, bits = case.args
    return {f"{CODES[w.dtype]} to {'int4' if bits <= 4 else 'int8'}"}


def _append_queries(case: Case, sms: int) -> Paths:
    q, k, *rest = case.args
    where = "contiguous" if case.args[9] is None else "pages"
    one_row = "a row" if case.args[-1] else "heads"
    group = f"{q.shape[1] // k.shape[1]} queries a head"
    found = _append(Case((k, *rest)), sms)
    return found | {f"{where}, {one_row}", f"{group}, {one_row}", f"queries of {NAMES[q.dtype]}"}


def _append(case: Case, sms: int) -> Paths:
    k, codes = case.args[0], case.args[4]
    heads, dim = k.shape[1:]
    storage = CODES.get(codes.dtype) or f"{NAMES[codes.dtype]} cache"
    if not case.args[-1]:
        return {f"heads of {NAMES[k.dtype]} to {storage}"}
    vector = 16 // k.dtype.itemsize
    aligned = dim % vector == 0
    threads = host.append_threads(heads * dim, vector if aligned else 2)
    found = {f"rows of {NAMES[k.dtype]} to {storage}, {'aligned' if aligned else 'any'}"}
    if heads * dim > KEPT_VECTORS * threads * vector:
        found.add("beyond the registers")
    return found


def _attention(
    q: torch.Tensor,
    codes: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
    pre_rope: bool,
    sms: int,
) -> Paths:
    heads, dim = q.shape[1:]
    kv_heads = codes.shape[1]
    half, quantized = q.dtype != torch.float32, codes.dtype in CODES
    storage = CODES.get(codes.dtype) or f"{NAMES[codes.dtype]} cache"
    tensor = host.attention_uses_tensor_cores(half, quantized, dim, True)
    longest = int(lengths.max())
    assert longest <= max_length
    splits = f"{min(3, host.attention_splits(longest))} splits"
    if not tensor:
        shape = "rotated" if pre_rope else "as it is"
        return {f"scalar, {storage}: {each}" for each in (shape, splits, NAMES[q.dtype])}
    shape = len(q), heads, kv_heads, dim, max_length, pre_rope
    per_block, pieces = host.attention_plan(*shape, sms)[:2]
    warps = f"{host.attention_parts(kv_heads)} warps {'apart' if pieces > 1 else 'together'}"
    instance = f"{storage}, {dim}, {'rotated' if pre_rope else 'as it is'}"
    found = {instance, f"{instance}: {splits}", f"{warps}: {splits}", NAMES[q.dtype]}
    if kv_heads % per_block:
        found.add(f"{warps}: the last block has fewer")
    if heads // kv_heads > FRAGMENT_HEADS:
        found.add(f"{warps}: query heads of two blocks")
    return {f"tensor cores, {each}" for each in found}


def _attention_decode(case: Case, sms: int) -> Paths:
    q, codes = case.args[:2]
    return _attention(q, codes, case.args[8], codes.shape[2], case.args[-1], sms)


def _attention_paged(case: Case, sms: int) -> Paths:
    q, codes = case.args[:2]
    lengths, max_length = case.args[9:11]
    return _attention(q, codes, lengths, max_length, case.args[13], sms)


def _attention_quantize(case: Case, sms: int) -> Paths:
    where = "contiguous" if case.args[5] is None else "pages"
    return _attention_paged(case, sms) | {f"{where}, codes of {case.args[-1]} bits"}


PATHS: dict[str, Callable[[Case, int], Paths]] = {
    "quantize": _quantize,
    "repack_weight": _repack_weight,
    "repacked_matmul": _repacked_matmul,
    "repacked_matmul_silu_mul": _silu_mul,
    "repacked_matmul_add": _repacked_matmul_add,
    "repacked_linear": _repacked_linear,
    "repacked_linear_add": _repacked_linear_add,
    "quantized_matmul": _quantized_matmul,
    "quantized_linear": _quantized_linear,
    "integer_group_matmul": _integer_groups,
    "rope_quantize_append": _append,
    "rope_quantize_append_paged": _append,
    "rope_quantize_append_queries": _append_queries,
    "attention_decode": _attention_decode,
    "attention_decode_paged": _attention_paged,
    "attention_decode_quantize": _attention_quantize,
}


def paths(op: str, case: Case, sms: int) -> Paths:
    """What a call of ``op`` reaches on a device with so many multiprocessors."""
    return PATHS[op](case, sms)
