"""Word perplexity against its definition written out in fp64, and against lm-eval."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from llmqat import QATConfig
from llmqat.convert import convert, prepare
from llmqat.data.dataset import read_texts
from llmqat.errors import ConfigError, DataError
from llmqat.eval.word_perplexity import count_words, rolling_windows, word_perplexity
from llmqat_kernels.errors import InvalidArgument
from tests.llmqat.tiny import tiny_llama
from tests.llmqat.tiny_tokenizer import save_character_tokenizer

SEQ_LEN = 16
TEXTS = [
    "one",
    "exactly sixteen.",
    "two windows and a rest of eight ids now.",
    " leading space,\nand a line\n",
    "x" * 32,
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(folder, add_bos=request.param)
    return AutoTokenizer.from_pretrained(folder)


def _log_likelihood(model, context, targets):
    """log P(targets | context), one logit at a time in fp64."""
    with torch.no_grad():
        logits = model(torch.tensor([context + targets[:-1]])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(context) - 1 :]
    return math.fsum(float(row[target]) for row, target in zip(rows, targets, strict=True))


def test_definition_by_hand(model, tokenizer):
    total = 0.0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        total += _log_likelihood(model, [1], ids[:SEQ_LEN])
        for begin in range(SEQ_LEN, len(ids), SEQ_LEN):
            end = min(begin + SEQ_LEN, len(ids))
            total += _log_likelihood(model, ids[end - SEQ_LEN - 1 : begin], ids[begin:end])
    result = word_perplexity(model, tokenizer, TEXTS, SEQ_LEN, progress=False)
    words = 1 + 2 + 9 + 7 + 1  # the fourth text begins and ends with white space
    assert (result.words, result.documents) == (words, 5)
    assert result.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert result.nll == pytest.approx(-total / words, rel=1e-6)
    assert result.perplexity == math.exp(result.nll)
    size = sum(map(len, TEXTS))
    assert result.byte_perplexity == pytest.approx(math.exp(-total / size), rel=1e-6)


def test_equals_lm_eval(model, tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import weighted_perplexity
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=SEQ_LEN)
    requests = [
        Instance("loglikelihood_rolling", {"text": text}, (text,), 0, ("t", index, 1))
        for index, text in enumerate(TEXTS)
    ]
    scores = lm.loglikelihood_rolling(requests)
    words = map(count_words, TEXTS)
    expected = weighted_perplexity(list(zip(scores, words, strict=True)))
    result = word_perplexity(model, tokenizer, TEXTS, SEQ_LEN, progress=False)
    assert result.perplexity == pytest.approx(expected, rel=1e-6)


def test_rolling_windows():
    assert list(rolling_windows([3, 4], 1, 4)) == [([1, 3, 4], 2)]
    assert list(rolling_windows([3, 4, 5, 6, 7], 1, 2)) == [
        ([1, 3, 4], 2),
        ([4, 5, 6], 2),
        ([5, 6, 7], 1),
    ]
    assert list(rolling_windows([], 1, 2)) == []


def test_batches_change_nothing(model, tokenizer):
    one = word_perplexity(model, tokenizer, TEXTS, SEQ_LEN, progress=False)
    many = word_perplexity(model, tokenizer, TEXTS, SEQ_LEN, batch_size=3, progress=False)
    assert many.nll == pytest.approx(one.nll, rel=1e-6)


def test_prepared_equals_packed(tokenizer, on_reference):
    config = QATConfig.parse("4-8-4", kv_mode="serving")
    prepared = prepare(tiny_llama(), config).eval()
    packed = convert(tiny_llama(), config)
    results = [
        word_perplexity(each, tokenizer, TEXTS, SEQ_LEN, progress=False)
        for each in (prepared, packed)
    ]
    assert results[0] == results[1]


def test_max_tokens_takes_whole_documents(model, tokenizer):
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    budget = lengths[0] + lengths[1] + 1
    result = word_perplexity(model, tokenizer, TEXTS, max_tokens=budget, seq_len=16, progress=False)
    assert (result.documents, result.tokens) == (2, budget - 1)
    with pytest.raises(DataError, match="at most max_tokens=1 tokens"):
        word_perplexity(model, tokenizer, TEXTS, 16, max_tokens=1, progress=False)


def test_refusals(model, tokenizer):
    with pytest.raises(DataError, match="holds no document"):
        word_perplexity(model, tokenizer, ["", " \n"], 16, progress=False)
    for change in ({"seq_len": 0}, {"seq_len": 513}, {"batch_size": 0}):
        with pytest.raises(InvalidArgument, match=next(iter(change))):
            word_perplexity(model, tokenizer, TEXTS, **{"seq_len": 16, **change}, progress=False)
    broken = tiny_llama()
    broken.model.norm.weight.data[:] = math.nan
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        word_perplexity(broken, tokenizer, TEXTS, 16, progress=False)


def test_a_tokenizer_without_special_tokens(model, tmp_path):
    save_character_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.bos_token = None
    by_eos = word_perplexity(model, tokenizer, TEXTS[:1], 16, progress=False)
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert by_eos.nll == pytest.approx(-_log_likelihood(model, [2], ids), rel=1e-6)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a beginning nor an end"):
        word_perplexity(model, tokenizer, TEXTS, 16, progress=False)


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.wiki").write_text("raw")
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2]}')
    assert list(read_texts(tmp_path / "a.txt")) == ["one\ntwo"]
    assert list(read_texts(tmp_path / "a.wiki")) == ["raw"]
    assert list(read_texts(tmp_path / "a.jsonl")) == ["one", "two"]
    with pytest.raises(DataError, match="holds token ids, not text"):
        list(read_texts(tmp_path / "ids.jsonl"))
    with pytest.raises(DataError, match="no text file at"):
        list(read_texts(tmp_path / "none.txt"))
