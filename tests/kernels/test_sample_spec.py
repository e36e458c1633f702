"""sample: spec 15 and 16, the generator, the distribution, and every backend against them."""

import math

import pytest
import torch

import llmqat_kernels as qk
from llmqat_kernels.errors import InvalidArgument
from llmqat_kernels.spec import sampling as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator

native = torch.ops.llmqat_cpu
INF, NAN = float("inf"), float("nan")


def draw(op, logits, record=None, step=None, greedy=False, seed=7, temperature=1.0, top_k=0):
    n = logits.shape[0]
    record = torch.arange(n) if record is None else record
    step = torch.full((n,), 3) if step is None else step
    return op(logits, record, step, torch.full((n,), greedy), seed, temperature, top_k)


@pytest.mark.parametrize(
    "counter, seed, words",
    [  # the known answers published with the generator (philox4x32, 10 rounds)
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, seed, words):
    got = spec.philox(tuple(torch.tensor([c]) for c in counter), seed)
    assert tuple(int(w) for w in got) == words


def test_uniforms_are_exact_and_inside_the_interval():
    u = spec.uniform(torch.tensor([5]), torch.tensor([0]), 100_000, 1)
    assert u.min() >= 2.0**-24 and u.max() <= 1 - 2.0**-24
    assert torch.equal(
        u.double() * 2**24 % 2, torch.ones_like(u, dtype=torch.float64)
    )  # odd multiples of 2^-24
    assert abs(u.mean().item() - 0.5) < 0.005


def test_noise_stays_below_the_bound_of_the_kernel():
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    noise = spec.gumbel(ends)
    assert torch.allclose(noise, torch.tensor([-2.8115, 16.6355]), atol=1e-3) and noise.max() < 16.7


def test_record_and_step_use_all_their_words():
    logits = torch.zeros(1, 5000)
    base = {"record": 5, "step": 3, "seed": 7}
    tokens = {int(draw(spec.sample, logits, torch.tensor([5]), torch.tensor([3])))}
    for name, value in (
        ("record", 6),
        ("record", 5 + 2**32),
        ("step", 4),
        ("seed", 8),
        ("seed", 7 + 2**32),
    ):
        case = {**base, name: value}
        tokens.add(
            int(
                draw(
                    spec.sample,
                    logits,
                    torch.tensor([case["record"]]),
                    torch.tensor([case["step"]]),
                    seed=case["seed"],
                )
            )
        )
    assert len(tokens) == 6


def test_greedy_takes_the_first_largest(isa):
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-INF, -3.0, -INF, -3.0], [0.0, INF, 1.0, INF]])
    for op in (spec.sample, native.sample):
        assert draw(op, logits, greedy=True).tolist() == [1, 1, 1]


def test_rows_without_a_token(isa):
    logits = torch.zeros(5, 70)
    logits[0, 69] = NAN
    logits[1] = -INF
    logits[2] = INF
    logits[3, :69], logits[3, 69] = -INF, -1e30
    for op in (spec.sample, native.sample):
        for greedy in (True, False):
            got = draw(op, logits, greedy=greedy).tolist()
            assert got[:4] == [-1, -1, -1, 69] and 0 <= got[4] < 70
        assert draw(op, torch.zeros(2, 0)).tolist() == [-1, -1]
        assert draw(op, torch.zeros(0, 9)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 3, 4, 63, 64, 65, 1000, 5003])
def test_native_equals_spec(isa, dtype, vocabulary):
    logits = (
        torch.randn(40, vocabulary, generator=generator(vocabulary))
        * torch.linspace(0, 8, 40)[:, None]
    )
    logits = logits.to(dtype)
    record = torch.randint(-(2**62), 2**62, (40,), generator=generator(1))
    step = torch.randint(0, 2**31, (40,), generator=generator(2))
    for temperature in (0.3, 1.0, 2.5):
        for top_k in (0, 1, 2, 50, vocabulary):
            args = (logits, record, step, False, -12345, temperature, top_k)
            assert_same_bits(
                draw(native.sample, *args), draw(spec.sample, *args), f"T={temperature}, k={top_k}"
            )


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, -3e7, 1e30])
def test_pruning_is_exact_where_scores_round_coarsely(isa, offset):
    """At large offsets a score's last place exceeds the noise: ties go to the first index."""
    logits = torch.randn(200, 300, generator=generator(3)) * 2 + offset
    assert_same_bits(draw(native.sample, logits), draw(spec.sample, logits))


def test_extremes_of_temperature(isa):
    logits = torch.randn(50, 200, generator=generator(4))
    for temperature in (1e-30, 1e-3, 1e30):
        got = draw(native.sample, logits, temperature=temperature)
        assert_same_bits(got, draw(spec.sample, logits, temperature=temperature))


def test_top_k_ties_go_to_the_smaller_index(isa):
    logits = torch.randint(0, 3, (300, 150), generator=generator(5)).float()
    for k in (1, 3, 60, 149):
        got = draw(native.sample, logits, top_k=k)
        assert_same_bits(got, draw(spec.sample, logits, top_k=k))
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
        assert (order == got[:, None]).any(-1).all()


def test_result_does_not_depend_on_the_batch(isa):
    logits = torch.randn(30, 777, generator=generator(6))
    record, step = torch.arange(100, 130), torch.arange(30)
    together = draw(native.sample, logits, record, step)
    order = torch.randperm(30, generator=generator(7))
    assert_same_bits(
        draw(native.sample, logits[order], record[order], step[order]), together[order]
    )
    for i in (0, 13, 29):
        assert_same_bits(
            draw(native.sample, logits[i : i + 1], record[i : i + 1], step[i : i + 1]),
            together[i : i + 1],
        )


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (1.0, 5)])
def test_chi_square(isa, temperature, top_k):
    draws, vocabulary = 60_000, 12
    logits = torch.randn(vocabulary, generator=generator(8))
    tokens = draw(native.sample, logits.expand(draws, -1), temperature=temperature, top_k=top_k)
    kept = logits.clone()
    if top_k:
        kept[logits < logits.sort(descending=True).values[top_k - 1]] = -INF
    expected = torch.softmax(kept / temperature, -1).double() * draws
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    chi_square = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


def test_mixed_greedy_rows(isa):
    logits = torch.randn(6, 90, generator=generator(9))
    greedy = torch.tensor([True, False] * 3)
    args = (logits, torch.arange(6), torch.arange(6), greedy, 1, 1.0, 0)
    got = native.sample(*args)
    assert_same_bits(got, spec.sample(*args))
    assert_same_bits(got[greedy], logits[greedy].argmax(-1))


def test_bad_arguments_name_the_argument(isa):
    logits, n, flags = (
        torch.zeros(2, 5),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.bool),
    )
    for message, args in {
        "logits": (logits[0], n, n, flags, 0),
        "record": (logits, n[:1], n, flags, 0),
        "step: expected int64": (logits, n, n.int(), flags, 0),
        "greedy: expected bool": (logits, n, n, n, 0),
        "temperature": (logits, n, n, flags, 0, 0.0),
        "top_k": (logits, n, n, flags, 0, 1.0, -1),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            native.sample(*args)


@pytest.mark.parametrize(
    "option, value",
    [("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 2**64)]
    + [("temperature", t) for t in (0.0, -1.0, INF, NAN, 1e39, 1e-50)],
)
def test_options_out_of_range_are_refused(option, value):
    n = torch.arange(2)
    with pytest.raises(InvalidArgument, match=f"^{option}: "):
        qk.sample(torch.zeros(2, 5), n, n, **{"seed": 0, option: value})


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_the_largest_seeds_are_taken(seed):
    n = torch.arange(2)
    assert qk.sample(torch.zeros(2, 5), n, n, seed=seed).shape == (2,)
