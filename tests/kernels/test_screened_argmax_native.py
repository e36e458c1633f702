"""screened_argmax: the token of the full float product, whatever the numbers, from few logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmqat.runtime.screen import HeadScreen, make_screen
from llmqat_kernels import native
from llmqat_kernels.testing import generator, special_rows

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.why_not()}"
)

OPS = torch.ops.llmqat_cpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def full(hidden: Tensor, packed: Tensor, n: int) -> list[int]:
    """Spec 16 on all logits of spec 17."""
    logits = OPS.float_matmul(hidden, packed, None, n)
    zero = torch.zeros(len(hidden), dtype=torch.int64)
    return OPS.sample(logits, zero, zero, torch.ones(len(hidden), dtype=torch.bool), 0).tolist()


def screened(hidden: Tensor, packed: Tensor, s: HeadScreen, n: int) -> tuple[list[int], list[int]]:
    """Tokens and candidates."""
    results = OPS.screened_argmax(hidden, packed, s.codes, s.scale, s.row_norms, s.error_norms, n)
    assert all(t.dtype == torch.int64 and t.shape == (len(hidden),) for t in results)
    return results[0].tolist(), results[1].tolist()


def check(hidden: Tensor, head: Tensor) -> list[int]:
    """The tokens are those of the full product; returns how many logits each row took."""
    packed = OPS.repack_weight(head, 16 if head.dtype == torch.bfloat16 else 32)
    tokens, candidates = screened(hidden, packed, make_screen(head), len(head))
    assert tokens == full(hidden, packed, len(head))
    assert all(0 <= count <= len(head) for count in candidates)
    return candidates


def rows(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(isa, dtype, stored):
    for n, k in ((1, 1), (15, 3), (16, 64), (17, 65), (64, 129), (65, 31), (333, 259), (1025, 96)):
        for m in (1, 2, 6, 7, 13):
            check(rows(m, k, m, dtype), rows(n, k, n, stored))


def test_few_candidates_on_random_data(isa):
    counts = check(rows(8, 576, 1), rows(8192, 576, 2, torch.bfloat16))
    assert max(counts) < 400 and sum(counts) < 800


def test_an_outlier_in_hidden_does_not_fool_the_bound(isa):
    hidden = rows(6, 256, 3)
    for row, (size, column) in enumerate([(1e2, 0), (1e4, 7), (1e8, 255), (-1e4, 3), (1e18, 9)]):
        hidden[row, column] = size
    check(hidden, rows(3000, 256, 4, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16))
def test_near_ties(isa, dtype, stored):
    """Rows that differ from the winner in the last bit of a value or two, in both directions."""
    hidden = rows(5, 130, 5, dtype)
    for seed in range(4):
        head = rows(700, 130, 6 + seed, stored)
        best = int((head.float() @ hidden[seed].float()).argmax())
        bits = torch.int32 if stored == torch.float32 else torch.int16
        places = torch.randperm(700, generator=generator(seed))[:200]
        for i, place in enumerate(places.tolist()):
            row = head[best].clone()
            row.view(bits)[i % 130] += 1 - 2 * (i % 2)
            head[place] = row
        check(hidden, head)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_the_first_index(isa, dtype):
    hidden, head = rows(4, 96, 8, dtype), rows(500, 96, 9)
    for first in (0, 15, 16, 130):
        best = int((head @ hidden[0].float()).argmax())
        head[[first, 131, 400, 499]] = head[best].clone()
        packed = OPS.repack_weight(head, 32)
        tokens, _ = screened(hidden[:1], packed, make_screen(head), 500)
        logits = OPS.float_matmul(hidden[:1], packed, None, 500)[0]
        assert tokens[0] == int((logits == logits.max()).nonzero()[0])
        check(hidden, head)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_logits_that_round_to_the_same_value(isa, dtype):
    """One column: logits so close that many share the largest 16-bit value."""
    head = (1 + torch.rand(2000, 1, generator=generator(1)) * 2.0**-7).float()
    for value in (1.0, -1.0, 3.3, 1e-6, -1e-6, 0.0, 6e4, -6e4):
        check(torch.tensor([[value]], dtype=dtype), head)
        check(torch.tensor([[value]], dtype=dtype), -head)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(isa, dtype):
    """Zeros, outliers, ties, denormals, NaN and Inf in hidden, beside one another."""
    for k in (33, 128, 576):
        hidden = special_rows(k, dtype)
        hidden = torch.cat([hidden, hidden.flip(0), -hidden])
        head = rows(300, k, k, torch.bfloat16)
        check(hidden, head)
        head[:50] = 0
        check(hidden, head)
        check(hidden, torch.zeros(40, k))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_non_finite_head(isa, value):
    head = rows(200, 64, 1)
    head[77, 5] = value
    hidden = rows(4, 64, 2)
    hidden[3] = 0
    counts = check(hidden, head)
    assert counts == [200] * 4  # the full product decides


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_overflow(isa, dtype):
    largest = torch.finfo(dtype).max
    hidden = rows(5, 48, 1).clamp(-1, 1)
    hidden = (hidden * torch.tensor([largest, largest / 8, 1e3, 1.0, 1e-3])[:, None]).to(dtype)
    for size in (1e38, 1e30, 1e18, 1e5, 1e-30, 1e-42):
        check(hidden, rows(300, 48, 2).clamp(-1, 1) * size)


def test_overflow_that_the_screen_does_not_see(isa):
    """Partial sums reach Inf where the whole sum is small."""
    hidden, head = torch.full((1, 8), 1.5e19), torch.zeros(100, 8)
    head[:, 0] = torch.linspace(-1, 1, 100) * 1e18
    head[41] = torch.tensor([1.5e19] * 4 + [-1.5e19] * 4)
    assert check(hidden, head) == [100]
    assert full(hidden, OPS.repack_weight(head, 32), 100) == [41]


def test_no_finite_fp16_logit(isa):
    """The best logit rounds to Inf although the bound's lower end does not; the others are -Inf."""
    head = torch.full((100, 1), -7e4)
    head[60] = 65520.05
    assert check(torch.ones(1, 1, dtype=torch.float16), head) == [100]
    assert full(torch.ones(1, 1, dtype=torch.float16), OPS.repack_weight(head, 32), 100) == [-1]


def test_adversarial_scales(isa):
    """Head rows of very different sizes: the bound is each row's own."""
    head = rows(1500, 96, 3) * torch.logspace(-8, 8, 1500)[torch.randperm(1500)][:, None]
    check(rows(7, 96, 4), head)
    head[:, 40] *= 1e6
    check(rows(7, 96, 5), head)
    cancelling = torch.cat([rows(1500, 48, 6), -rows(1500, 48, 6)], dim=1)
    check(torch.cat([rows(7, 48, 7)] * 2, dim=1), cancelling + rows(1500, 96, 8) * 1e-6)


def test_error_of_the_screen_along_hidden(isa):
    """Cauchy-Schwarz met with equality: the winner's rounding error is parallel to hidden."""
    hidden = torch.randint(-100, 101, (64,), generator=generator(1)).float()
    hidden[:3] = torch.tensor([0.0, 100.0, 127.0])  # exact as codes of scale 1
    codes = torch.randint(-3, 4, (64,), generator=generator(2)).float()
    codes *= torch.sign(codes @ hidden)
    codes[0] = 127
    size = float(hidden.square().sum())
    for share in (0.9, 0.97, 0.99):  # of the bound, by which the other row looks better
        winner = codes + hidden * (100 / share / size)
        other = codes.clone()
        other[1] += 1
        head = torch.cat([other[None], winner[None], (-codes).expand(200, 64)])
        assert torch.equal(OPS.quantize(head, 8)[0][1].float(), codes)
        assert int((head.double() @ hidden.double()).argmax()) == 1
        assert check(hidden[None], head) == [2]


def test_error_of_hidden_along_a_row(isa):
    """The same for what the two parts leave of hidden: parallel to the winning row."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    step = 2.0**-8
    parts = (torch.arange(32) % 4 + step * (torch.arange(32) % 90 - 45)).repeat_interleave(2)
    hidden = torch.cat([torch.tensor([127.0, 127 * step]), parts + 0.4 * step * signs])
    winner = torch.cat([torch.zeros(2), 127 * signs])
    exact = float(hidden.double() @ winner.double())
    for share in (0.9, 0.97, 0.99):
        other = torch.zeros(66)
        other[0] = share * exact / 127
        head = torch.cat([other[None], winner[None], -other.expand(200, 66)])
        assert check(hidden[None], head) == [2]


def test_random_search(isa):
    """Many small problems of few distinct values: ties and near ties are the rule."""
    for seed in range(60):
        g = generator(seed)
        n, k = (int(torch.randint(1, 90, (), generator=g)) for _ in range(2))
        head = torch.randint(-2, 3, (n, k), generator=g) * 2.0 ** -(seed % 5)
        hidden = torch.randint(-3, 4, (3, k), generator=g).float()
        check(hidden + (seed % 3) * 1e-7, head + (seed % 2) * 2.0**-22)


def test_empty():
    s = make_screen(torch.zeros(4, 8))
    packed = OPS.repack_weight(torch.zeros(4, 8), 32)
    assert screened(torch.zeros(0, 8), packed, s, 4) == ([], [])
    assert screened(torch.zeros(2, 8), packed, s, 4)[0] == [0, 0]
    assert check(torch.zeros(2, 0), torch.zeros(5, 0)) == [5, 5]
    codes = OPS.repack_weight(torch.zeros(0, 8, dtype=torch.int8), 8)
    nothing = HeadScreen(codes, *[torch.empty(0)] * 3)
    none = OPS.repack_weight(torch.zeros(0, 8), 32)
    assert screened(torch.zeros(2, 8), none, nothing, 0) == ([-1, -1], [0, 0])


def test_threads_do_not_change_tokens():
    hidden, head = rows(7, 96, 1), rows(20000, 96, 2, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        counts = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            counts.append(check(hidden, head))
        assert counts[0] == counts[1]
    finally:
        torch.set_num_threads(before)


def test_norms_are_upper_bounds():
    head = rows(300, 577, 1) * torch.logspace(-20, 15, 300)[:, None]
    s = make_screen(head)
    codes, scale = OPS.quantize(head, 8)
    error = head.double() - codes.double() * scale[:, None].double()
    assert (s.row_norms.double() >= head.double().norm(dim=1)).all()
    assert (s.error_norms.double() >= error.norm(dim=1)).all()
    assert (s.error_norms.double() <= error.norm(dim=1) * (1 + 1e-5) + 2.0**-59).all()
    assert s.nbytes == s.codes.nbytes + 3 * 4 * 300


HEAD = torch.ones(6, 8)
SCREEN = make_screen(HEAD) if native.is_available() else None


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("hidden", torch.zeros(8), "hidden: expected 2 dimensions"),
        ("hidden", torch.zeros(1, 8).double(), "hidden: expected float32"),
        ("hidden", torch.zeros(1, 7), "head: repacked for K = 8, but hidden has K = 7"),
        ("head", torch.zeros(64, dtype=torch.uint8), "w: not a weight made by repack_weight"),
        ("head", "codes", "head: repacked from integer codes"),
        ("screen", "head", "w: repacked for another bit width"),
        ("screen_scale", torch.ones(5), "screen_scale: expected size 6"),
        ("row_norms", torch.ones(6).double(), "row_norms: expected float32"),
        ("error_norms", torch.ones(6, 1), "error_norms: expected 1 dimensions"),
        ("n", 5, "n: the repacked head has 6 rows, got 5"),
    ],
)
def test_bad_arguments(name, value, words):
    packed = OPS.repack_weight(HEAD, 32)
    arguments = {
        "hidden": torch.zeros(1, 8),
        "head": packed,
        "screen": SCREEN.codes,
        "screen_scale": SCREEN.scale,
        "row_norms": SCREEN.row_norms,
        "error_norms": SCREEN.error_norms,
        "n": 6,
    }
    others = {"codes": SCREEN.codes, "head": packed}
    arguments[name] = others[value] if isinstance(value, str) else value
    with pytest.raises(RuntimeError, match=words):
        OPS.screened_argmax(**arguments)
