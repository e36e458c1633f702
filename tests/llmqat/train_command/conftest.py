"""A tiny model, records and a finished run, of folders that every test of `llmqat train` shares."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llmqat
import llmqat_kernels as qk
from llmqat import cli
from llmqat.data import Record, RecordWriter
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.train_command.command import VOCAB, train_argv


@pytest.fixture(autouse=True)
def _reference():
    with qk.use_backend("reference"):
        yield


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    """A tiny model folder with a word tokenizer."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    llmqat.save_pretrained(tiny_llama(tied=True, vocab=VOCAB), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """A folder of generated records."""
    folder = tmp_path_factory.mktemp("data")
    with RecordWriter(folder, {"vocab_size": VOCAB}, records=24) as writer:
        writer.write([Record(i, random_tokens(i, 1, 20)[0].numpy()) for i in range(24)])
    return folder


@pytest.fixture(scope="package")
def trained(model, data, tmp_path_factory):
    """The folder of a whole run of :func:`train_argv`; to be read only."""
    output = tmp_path_factory.mktemp("out") / "qat"
    with qk.use_backend("reference"):
        assert cli.main(train_argv(model, data, output)) == 0
    return output
