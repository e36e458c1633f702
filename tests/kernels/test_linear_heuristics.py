"""How the CUDA linears are cut into blocks of threads: pure functions of the host module."""

import json
from pathlib import Path

import pytest

pytest.importorskip("llmqat_kernels._host", reason="built without pybind11")

from llmqat_kernels import _host as host
from tests.kernels.cuda_paths import portions

MULTIPROCESSORS = (1, 2, 78, 108, 132, 144)
STAGE_BYTES = {True: 8192, False: 16384}
"""Weights of a block in one stage, of 4 bits and of 8."""
GROUPS = [(1, 1), (3, 5), (18, 2), (32, 32), (128, 8), (172, 32), (384, 8), (688, 8), (32, 86)]
"""Groups and their stages."""
RECORD = Path(__file__).parents[2] / "docs/kernels/sass.json"


@pytest.mark.parametrize("nibbles", [True, False])
@pytest.mark.parametrize("sms", MULTIPROCESSORS)
@pytest.mark.parametrize(("groups", "stages"), GROUPS)
def test_every_stage_is_covered_once(groups, stages, sms, nibbles):
    for per_sm in (1, 2, 3, 8):
        plan = host.linear_plan(groups, stages, STAGE_BYTES[nibbles], sms, per_sm)
        blocks, whole, cut = plan
        assert 1 <= blocks <= min(groups * stages, sms * per_sm)
        assert blocks * whole + cut == groups
        assert cut < blocks, "a cut group has a slot and a ticket of its own"
        seen = []
        for block in portions(plan, stages):
            assert block, "no idle block"
            seen += [(group, first + s) for group, first, count in block for s in range(count)]
        assert sorted(seen) == [(g, s) for g in range(groups) for s in range(stages)]


@pytest.mark.parametrize("sms", MULTIPROCESSORS)
@pytest.mark.parametrize(("groups", "stages"), GROUPS)
def test_work_is_even(groups, stages, sms):
    """No multiprocessor has more to do than its share, a rounding, and what sharing would cost."""
    plan = host.linear_plan(groups, stages, 8192, sms, 3)
    work = [sum(count for _, _, count in block) for block in portions(plan, stages)]
    # Blocks are placed on the multiprocessors in turn.
    busiest = max(sum(work[sm::sms]) for sm in range(min(sms, len(work))))
    blocks_each = -(-len(work) // sms)
    assert busiest <= -(-groups * stages // sms) + blocks_each + 32768 // 8192


@pytest.mark.parametrize(
    ("n", "k", "sms", "shared"),
    [
        *((4096, 4096, 132, False), (12288, 4096, 132, False), (4096, 11008, 132, False)),
        *((22016, 4096, 132, True), (4096, 4096, 108, True), (576, 576, 132, False)),
    ],
)
def test_groups_of_few_tokens_are_cut_where_whole_ones_do_not_deal_out(n, k, sms, shared):
    """One token, 4 bits: whole groups of 32 channels fill 132 multiprocessors with three of the
    four products of a 7B model."""
    ways = host.linear_ways(1)
    _, whole, cut = host.linear_plan(n // 32, -(-k // (128 * ways)), 8192, sms, 3)
    assert (cut > 0) == shared
    if n == 22016:
        assert whole == 1, "while their sums are added up, each block has a group of its own"


def test_blocks_of_a_multiprocessor():
    assert [host.linear_blocks_per_sm(t, 9) for t in (1, 2, 4, 8)] == [3, 3, 3, 2]
    assert [host.linear_blocks_per_sm(1, resident) for resident in (0, 1, 2)] == [1, 1, 2]
    assert [host.linear_blocks_per_sm(t, 2, 99) for t in (1, 2, 4, 8)] == [8, 8, 4, 2]
    assert host.linear_blocks_per_sm(8, 2, 1) == 1 and host.linear_blocks_per_sm(1, 2, -1) == 2


@pytest.mark.parametrize("arch", [80, 90])
def test_registers_leave_room_for_the_blocks(arch):
    """What launchers ask the driver for: registers never allow less than the heuristics want."""
    kernels = json.loads(RECORD.read_text())["kernels"]
    found = 0
    for tokens in (1, 2, 4, 8):
        for nibbles in ("false", "true"):
            name = f"integer_linear_kernel<{nibbles}, {tokens}>"
            (kernel,) = (k for k in kernels if (k["name"], k["arch"]) == (name, arch))
            registers = -(-kernel["registers"] // 8) * 8  # given out by eights
            assert host.linear_blocks_per_sm(tokens, 65536 // (registers * 128)) == (
                3 if tokens <= 4 else 2
            )
            assert registers <= 232, "another release of the compiler may need some more"
            found += 1
    assert found == 8


def test_float_splits_fit_the_workspace_and_ignore_m():
    for groups in (1, 3, 32, 172, 1000):
        for sms in MULTIPROCESSORS:
            for stages in (1, 4, 16, 43):
                splits = host.linear_float_splits(groups, stages, sms)
                assert 1 <= splits <= stages
                assert splits == 1 or groups * splits <= 2 * sms
                cuts = [host.linear_float_cut(stages, splits, s) for s in range(splits + 1)]
                assert cuts[0] == 0 and cuts[-1] == stages and cuts == sorted(set(cuts))


def test_workspace_has_a_ticket_and_a_slot_for_every_block():
    for sms in MULTIPROCESSORS:
        values = 128 * 2 * 4  # threads, halves, values of a thread for a column of 8 tokens
        slots = host.linear_workspace_bytes(sms) - 8192
        for columns in (1, 2, 4, 8):
            most = sms * host.linear_blocks_per_sm(columns, 99, 99)
            assert most * columns * values * 4 <= slots
            assert most * 4 <= 8192


def test_token_tiles():
    tiles = [host.linear_token_tiles(m) for m in (1, 8, 9, 16, 17, 32, 33, 64)]
    assert tiles == [1, 1, 2, 2, 4, 4, 8, 8]
