"""Tokenizers of 128 ids for tiny models: words w3 ... w127, or characters."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, vocab: int = 128) -> None:
    """`<unk>`, `<s>`, `</s>`, then w3 ... w127: write the tokenizer's files into `folder`."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_character_tokenizer(folder: Path, *, add_bos: bool = False) -> None:
    """A tokenizer of 128 ids in which every character of English text is a token of its own;
    `add_bos` puts `<s>` in front, as LLaMA's does.
    """
    characters = ["\n", *map(chr, range(32, 127))]
    words = ["<unk>", "<s>", "</s>", *characters, *(f"<{i}>" for i in range(29))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    if add_bos:
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
