"""Word perplexity of documents, as evaluation harnesses define it.

Definition. Every document is tokenized alone, as the tokenizer does by default (with its special
tokens, if it adds any). All its ids ``t[0..n)`` are predicted, in windows of at most ``seq_len``
ids that follow one another: the first window sees the prefix id (beginning of sequence, else end of
sequence) in front of ``t[0]``; each later window predicts the next ``seq_len`` ids, the last one
those that remain, and sees the ids before them up to ``seq_len`` ids of input in all, hence one id
of context for a full window and more for the last.

    perplexity = exp(-sum of log-likelihoods over all documents / number of words)

Words are the pieces of ``re.split(r"\\s+", text)``: white space at the very beginning or end of a
document adds an empty piece each, which counts. This is lm-eval's ``loglikelihood_rolling`` with
its ``word_perplexity``, on the text as it stands (lm-eval's own ``wikitext`` task also undoes the
tokenization of WikiText). It does not compare with the perplexity per token of `perplexity`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from llmqat.errors import ConfigError, DataError
from llmqat.eval.perplexity import evaluating, exp_or_inf
from llmqat_kernels.errors import InvalidArgument


@dataclass(frozen=True)
class WordPerplexityResult:
    """What :func:`word_perplexity` measured.

    Attributes:
        perplexity: ``exp(nll)``, per word.
        nll: negative log-likelihood per word, in nats.
        byte_perplexity: ``exp`` of the negative log-likelihood per UTF-8 byte.
        words: number of words.
        tokens: number of predicted tokens.
        seq_len: ids of input per window at most.
        windows: number of windows.
        documents: number of documents.
    """

    perplexity: float
    nll: float
    byte_perplexity: float
    words: int
    tokens: int
    seq_len: int
    windows: int
    documents: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, for JSON."""
        return asdict(self)


def count_words(text: str) -> int:
    """Pieces between white space; the module's head says what counts."""
    return len(re.split(r"\s+", text))


def rolling_windows(ids: list[int], prefix: int, seq_len: int) -> Iterator[tuple[list[int], int]]:
    """The windows of one document: input ids with the last predicted id appended, and how many ids
    at the end are predicted.
    """
    line = [prefix, *ids]
    for begin in range(0, len(ids), seq_len):
        end = min(begin + seq_len, len(ids))
        # The input holds seq_len ids: where fewer are predicted, earlier ones stand before them.
        first = max(0, end - seq_len)
        yield line[first : end + 1], end - begin


def word_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    seq_len: int = 2048,
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> WordPerplexityResult:
    """Word perplexity of a causal language model; the definition heads this module.

    Args:
        model: a transformers ``*ForCausalLM``, plain, prepared or converted.
        tokenizer: its tokenizer, which has a beginning or an end of sequence token.
        documents: texts; empty ones are left out.
        seq_len: ids of input per window.
        max_tokens: stop before the first document that would make it more tokens than this.
        batch_size: windows of equal length per forward pass; changes speed and memory only.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no text, or one document has more than `max_tokens`.
        ConfigError: the tokenizer has neither of the two tokens.
        InvalidArgument: an argument out of range.
        FloatingPointError: the model's loss is NaN or infinite.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise InvalidArgument(f"{name}: expected a positive number, got {value}")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise InvalidArgument(f"seq_len: the model has {positions} positions, got {seq_len}")
    prefix = tokenizer.bos_token_id
    if prefix is None:
        prefix = tokenizer.eos_token_id
    if prefix is None:
        raise ConfigError(
            "tokenizer: it has neither a beginning nor an end of sequence token to put in front of"
            " a document"
        )
    windows: list[tuple[list[int], int]] = []
    words = tokens = size = count = 0
    for text in documents:
        if not text.strip():
            continue
        ids = tokenizer(text, verbose=False)["input_ids"]
        if max_tokens is not None and tokens + len(ids) > max_tokens:
            break
        windows += rolling_windows(ids, prefix, seq_len)
        words, tokens = words + count_words(text), tokens + len(ids)
        size, count = size + len(text.encode()), count + 1
    if not count:
        raise DataError(
            "the text holds no document"
            + (
                ""
                if max_tokens is None
                else f" of at most max_tokens={max_tokens} tokens; give documents as lines of a"
                ' .jsonl file, {"text": ...}'
            )
        )
    total = -_score(model, windows, batch_size, progress)
    nll = total / words
    return WordPerplexityResult(
        exp_or_inf(nll),
        nll,
        exp_or_inf(total / size),
        words,
        tokens,
        seq_len,
        len(windows),
        count,
    )


def _score(
    model: nn.Module, windows: list[tuple[list[int], int]], batch_size: int, progress: bool
) -> float:
    """Summed log-likelihood of the predicted ids of all windows."""
    device = cast(nn.Embedding, cast(Any, model).get_input_embeddings()).weight.device
    total = 0.0
    with (
        evaluating(model),
        tqdm(
            total=len(windows), unit="window", desc="word perplexity", disable=not progress
        ) as bar,
    ):
        for batch in _batches(windows, batch_size):
            rows = torch.tensor([ids for ids, _ in batch], device=device)
            logits = cast(Any, model)(input_ids=rows[:, :-1], use_cache=False).logits
            for row, scores, (_, predicted) in zip(rows, logits, batch, strict=True):
                value = _log_likelihood(scores[-predicted:], row[-predicted:])
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the loss of a window of {predicted} tokens is {-value}: the weights or"
                        " activations hold NaN or Inf, or overflow their dtype"
                    )
                total += value
            bar.update(len(batch))
    return total


def _batches(
    windows: list[tuple[list[int], int]], batch_size: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Neighbouring windows of equal length, at most `batch_size` at a time: nothing is padded."""
    batch: list[tuple[list[int], int]] = []
    for window in windows:
        if batch and (len(batch) == batch_size or len(batch[0][0]) != len(window[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum of fp32 log-softmax at the targets, in fp64; logits [n, vocab], targets [n]."""
    return -float(F.cross_entropy(logits.float(), targets, reduction="none").double().sum())
