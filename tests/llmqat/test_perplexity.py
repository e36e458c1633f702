"""Perplexity against its definition written out in fp64, and its refusals."""

import json
import math
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llmqat.eval.perplexity as module
from llmqat.errors import DataError
from llmqat.eval.perplexity import encode_text_file, perplexity
from llmqat_kernels.errors import InvalidArgument, InvalidArgumentType

VOCAB = 101


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCAB, (203,), generator=torch.Generator().manual_seed(1))


def _by_hand(model, windows):
    """Mean loss of a list of windows, one logit at a time in fp64."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for i in range(len(window) - 1):
            losses.append(float(torch.logsumexp(logits[i], 0) - logits[i, window[i + 1]]))
    return math.fsum(losses) / len(losses)


def test_definition(model, ids):
    windows = [ids[i : i + 16].tolist() for i in range(0, 192, 16)]
    result = perplexity(model, ids, seq_len=16, progress=False)
    assert (result.windows, result.tokens, result.seq_len) == (12, 12 * 15, 16)
    assert result.nll == pytest.approx(_by_hand(model, windows), rel=1e-6)
    assert result.perplexity == math.exp(result.nll)
    assert result.to_dict()["perplexity"] == result.perplexity


def test_bos_and_max_tokens(model, ids):
    windows = [[7, *ids[i : i + 15].tolist()] for i in range(0, 45, 15)]
    result = perplexity(model, ids, seq_len=16, max_tokens=59, bos_token_id=7, progress=False)
    assert result.windows == 3
    assert result.nll == pytest.approx(_by_hand(model, windows), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("chunk", [VOCAB, 7 * VOCAB, 1 << 24])
def test_batch_and_chunk_change_nothing_but_rounding(model, ids, batch_size, chunk, monkeypatch):
    expected = perplexity(model, ids, seq_len=16, progress=False).nll
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    result = perplexity(model, ids[None], seq_len=16, batch_size=batch_size, progress=False)
    assert result.nll == pytest.approx(expected, rel=1e-6)


def test_whole_logits_agree_with_chunked_head(model, ids, monkeypatch):
    assert module._has_plain_head(model)
    expected = perplexity(model, ids.tolist(), seq_len=16, progress=False).nll
    monkeypatch.setattr(module, "_has_plain_head", lambda _: False)
    result = perplexity(model, ids.tolist(), seq_len=16, progress=False)
    assert result.nll == pytest.approx(expected, rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    class Uniform(nn.Module):
        config = SimpleNamespace(vocab_size=50)

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 1)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    result = perplexity(Uniform(), list(range(50)), seq_len=10, progress=False)
    assert result.perplexity == pytest.approx(50, rel=1e-6)


def test_transformed_logits_are_not_rebuilt_from_the_head(model):
    config = model.config
    config.final_logit_softcapping = 30.0
    try:
        assert not module._has_plain_head(model)
    finally:
        del config.final_logit_softcapping


def test_modes_are_restored(model, ids):
    model.train()
    model.model.layers[0].eval()
    perplexity(model, ids, seq_len=16, max_tokens=16, progress=False)
    assert model.training and not model.model.layers[0].training
    assert model.model.layers[1].training
    model.eval()


def test_hopeless_model_gives_infinity_not_an_overflow(ids):
    assert module.exp_or_inf(701.0) == math.inf


def test_non_finite_loss(model, ids):
    weight = model.model.norm.weight
    saved = weight.detach().clone()
    try:
        weight.data[3] = math.nan
        with pytest.raises(FloatingPointError, match=r"windows 0\.\.1 is nan"):
            perplexity(model, ids, seq_len=16, batch_size=2, progress=False)
    finally:
        weight.data.copy_(saved)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input_ids": []}, DataError, "empty"),
        ({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, InvalidArgument, "input_ids"),
        ({"input_ids": torch.zeros(32)}, InvalidArgumentType, "integer"),
        ({"input_ids": torch.zeros(32, dtype=torch.bool)}, InvalidArgumentType, "integer"),
        ({"input_ids": [0.5] * 32}, InvalidArgumentType, "integer"),
        ({"input_ids": list(range(15))}, DataError, "15 tokens.*needs 16"),
        ({"max_tokens": 15}, DataError, "needs 16"),
        ({"max_tokens": 0}, InvalidArgument, "max_tokens"),
        ({"input_ids": [VOCAB] * 16}, DataError, "vocabulary"),
        ({"input_ids": [-1] * 16}, DataError, "vocabulary"),
        ({"bos_token_id": VOCAB}, DataError, "vocabulary"),
        ({"seq_len": 1}, InvalidArgument, "seq_len"),
        ({"seq_len": 65}, InvalidArgument, "64 positions"),
        ({"batch_size": 0}, InvalidArgument, "batch_size"),
    ],
)
def test_refusals(model, ids, change, error, text):
    arguments = {"input_ids": ids, "seq_len": 16, "progress": False, **change}
    with pytest.raises(error, match=text) as caught:
        perplexity(model, **arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "c": 3, "?": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", model_max_length=2)


def test_encode_text_file_adds_no_special_tokens(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b\nc zebra\n", encoding="utf-8")
    encoded = encode_text_file(tokenizer, path)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [1, 2, 3, 4]


def test_encode_text_file_reads_documents_by_suffix(tokenizer, tmp_path):
    """Rows are joined by an empty line; any other file stays as it is."""
    seen = []

    def spy(text, **options):
        seen.append(text)
        return tokenizer(text, **options)

    rows = [{"text": "a b"}, {"text": "c zebra\n"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.md").write_text('{"text": "a"}\n')
    for suffix in ("jsonl", "parquet", "md"):
        encode_text_file(spy, tmp_path / f"t.{suffix}")
    assert seen == ["a b\n\nc zebra\n"] * 2 + ['{"text": "a"}\n']
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2]}')
    with pytest.raises(DataError, match="holds token ids, not text"):
        encode_text_file(tokenizer, tmp_path / "ids.jsonl")


def test_encode_text_file_refusals(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no text file"):
        encode_text_file(tokenizer, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        encode_text_file(tokenizer, tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="UTF-8"):
        encode_text_file(tokenizer, tmp_path / "bytes.txt")
