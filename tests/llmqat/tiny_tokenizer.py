"""A tokenizer of 128 words for tiny models: `<unk>`, `<s>`, `</s>`, then w3 ... w127."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, vocab: int = 128) -> None:
    """Write the tokenizer's files into `folder`."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
