"""sample on the Triton backend: bit-equal to spec 15, 16."""

import pytest
import torch

from llmqat_kernels.backends.triton.sample import SPAN, signed_word
from llmqat_kernels.spec import sampling as spec
from llmqat_kernels.testing import DTYPES, assert_same_bits, generator
from tests.kernels.test_sample_spec import draw

from .device import run
from .guard import guard_bands

INF, NAN = float("inf"), float("nan")


def op(*args):
    return run("sample", *args)


def assert_equals_spec(logits, **kwargs):
    with guard_bands():
        got = draw(op, logits, **kwargs)
    assert_same_bits(got, draw(spec.sample, logits, **kwargs), str(kwargs))


def random_logits(rows, vocabulary, dtype=torch.float32):
    logits = torch.randn(rows, vocabulary, generator=generator(vocabulary))
    return (logits * torch.linspace(0.5, 8, rows)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 3, 4, 65, 1029])
def test_equals_spec(dtype, vocabulary):
    logits = random_logits(3, vocabulary, dtype)
    record = torch.tensor([5, -(2**62) + 1, 2**40 + 3])
    step = torch.tensor([0, 2**31 - 1, 2**31])
    for temperature, top_k in ((1.0, 0), (0.3, 0)):
        assert_equals_spec(
            logits, record=record, step=step, seed=-12345, temperature=temperature, top_k=top_k
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 50, 299, 300, 1000])
def test_top_k_equals_spec(dtype, top_k):
    assert_equals_spec(random_logits(2, 300, dtype), top_k=top_k, temperature=0.7)


def test_several_spans():
    logits = random_logits(2, SPAN + 905)
    assert_equals_spec(logits)
    assert_equals_spec(logits, top_k=40)


def test_a_real_vocabulary():
    assert_equals_spec(random_logits(1, 49_153, torch.bfloat16))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63)])
def test_seeds_of_64_bits(seed):
    assert_equals_spec(torch.zeros(1, 50), seed=seed)
    low, high = signed_word(seed), signed_word(seed >> 32)
    assert (low & 0xFFFFFFFF, high & 0xFFFFFFFF) == (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert -(2**31) <= low < 2**31 and -(2**31) <= high < 2**31


@pytest.mark.parametrize("top_k", [1, 3, 60, 149])
def test_top_k_ties_go_to_the_smaller_index(top_k):
    logits = torch.randint(0, 3, (4, 150), generator=generator(5)).float()
    logits[1] *= -0.0  # both zeros are equal
    logits[2] -= 1
    assert_equals_spec(logits, top_k=top_k)


@pytest.mark.parametrize("offset", [1e6, -3e7, 1e30])
def test_ties_of_scores_go_to_the_first_index(offset):
    """At large offsets a score's last place exceeds the noise."""
    assert_equals_spec(random_logits(3, 300) + offset)


def test_extremes_of_temperature():
    for temperature in (1e-30, 1e-3, 1e30):
        assert_equals_spec(random_logits(2, 60), temperature=temperature)


def test_greedy_takes_the_first_largest():
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-INF, -3.0, -INF, -3.0], [0.0, INF, 1.0, INF]])
    assert draw(op, logits, greedy=True).tolist() == [1, 1, 1]
    tied = torch.zeros(1, 2 * SPAN)
    tied[0, [SPAN - 1, SPAN + 1]] = 1.0  # in different spans
    assert draw(op, tied, greedy=True).tolist() == [SPAN - 1]


@pytest.mark.parametrize("top_k", [0, 5])
def test_rows_without_a_token(top_k):
    logits = torch.zeros(5, 70)
    logits[0, 69] = NAN
    logits[1] = -INF
    logits[2] = INF
    logits[3, :69], logits[3, 69] = -INF, -1e30
    logits[4, 3] = INF
    for greedy in (True, False):
        got = draw(op, logits, greedy=greedy, top_k=top_k).tolist()
        assert got == [-1, -1, -1, 69, 3]
    assert draw(op, torch.zeros(2, 0)).tolist() == [-1, -1]
    assert draw(op, torch.zeros(0, 9)).shape == (0,)


def test_mixed_greedy_rows():
    logits = random_logits(4, 90)
    greedy = torch.tensor([True, False, True, False])
    args = (logits, torch.arange(4), torch.arange(4), greedy, 1, 1.0, 0)
    got = op(*args)
    assert_same_bits(got, spec.sample(*args))
    assert_same_bits(got[greedy], logits[greedy].argmax(-1))


def test_result_does_not_depend_on_the_batch_or_its_layout():
    logits = random_logits(4, 200)
    record, step = torch.arange(100, 104), torch.arange(4)
    together = draw(op, logits, record, step)
    order = torch.tensor([2, 0, 3, 1])
    assert_same_bits(draw(op, logits[order], record[order], step[order]), together[order])
    assert_same_bits(draw(op, logits[2:3], record[2:3], step[2:3]), together[2:3])
    padded = torch.cat((logits, torch.full((4, 7), INF)), dim=1)[:, :200]
    for layout in (padded, logits.t().contiguous().t()):
        assert_same_bits(draw(op, layout, record, step), together)
    # One row of logits for many records: a row stride of 0.
    repeated = draw(op, logits[:1].expand(4, -1), record, step)
    assert_same_bits(repeated, draw(op, logits[:1].repeat(4, 1), record, step))
