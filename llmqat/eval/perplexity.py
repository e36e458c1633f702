"""Token perplexity over fixed windows, with one exact definition.

Definition. The token ids of the text, ``t[0..n)``, are cut from the start into windows of
``seq_len`` ids that do not overlap; an incomplete last window is dropped. Inside a window the model
sees ids ``0..i`` and predicts id ``i + 1``, for ``i = 0 .. seq_len - 2``; nothing is carried from
one window to the next, and the first id of a window is never predicted.

    nll = -mean over all predicted ids of log softmax(logits)[id]      perplexity = exp(nll)

The log-softmax is in fp32 whatever the model computes in, the mean in fp64. No
beginning-of-sequence id is added unless ``bos_token_id`` is given; then each window is that id
followed by ``seq_len - 1`` ids of the text, all of which are predicted.

This is the protocol of the quantization literature (windows of 2,048 ids of the concatenated text),
not the per-word perplexity of evaluation harnesses: the two numbers do not compare, and neither do
perplexities of models with different tokenizers or of windows of different lengths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from llmqat.data.dataset import read_texts
from llmqat.errors import DataError
from llmqat_kernels.errors import InvalidArgument, InvalidArgumentType

DOCUMENT_BREAK = "\n\n"
"""Between two documents of a text that is measured as a whole."""
_CHUNK_ELEMENTS = 1 << 24
"""fp32 logits alive at a time: 64 MiB, small beside any model worth measuring."""
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Configuration names that make a model's logits more than ``lm_head(hidden)``."""


@dataclass(frozen=True)
class PerplexityResult:
    """What :func:`perplexity` measured.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood per predicted token, in nats.
        tokens: number of predicted tokens.
        seq_len: ids per window, the beginning-of-sequence id included.
        windows: number of windows.
    """

    perplexity: float
    nll: float
    tokens: int
    seq_len: int
    windows: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, for JSON."""
        return asdict(self)


def encode_text_file(tokenizer: Any, path: str | os.PathLike[str]) -> torch.Tensor:
    """The token ids of a whole text, without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        path: the documents of a ``.jsonl`` or ``.parquet`` file, with an empty line between two;
            any other file is UTF-8 text as it stands.

    Returns:
        int64 [n].

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a row has no text.
    """
    path = Path(path)
    text = _whole_text(path)
    if not text.strip():
        raise DataError(f"{path.name} holds no text")
    # verbose=False: the text is meant to be longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _whole_text(path: Path) -> str:
    if path.suffix in (".jsonl", ".parquet"):
        return DOCUMENT_BREAK.join(read_texts(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text: {error.reason} at {error.start}"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"no text file at {path}") from error


def _as_ids(input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    if not isinstance(input_ids, torch.Tensor):
        input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise InvalidArgument(f"input_ids: expected [n] or [1, n], got {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise DataError("input_ids: the text is empty")
    dtype = input_ids.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise InvalidArgumentType(f"input_ids: expected integer token ids, got {dtype}")
    return input_ids.to("cpu", torch.int64)


def _windows(
    input_ids: torch.Tensor | Sequence[int],
    seq_len: int,
    max_tokens: int | None,
    bos_token_id: int | None,
    vocab_size: int,
) -> torch.Tensor:
    """The validated windows, int64 [windows, seq_len]."""
    if seq_len < 2:
        raise InvalidArgument(f"seq_len: a window needs at least 2 ids, got {seq_len}")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidArgument(f"max_tokens: expected a positive number, got {max_tokens}")
    ids = _as_ids(input_ids)[:max_tokens]
    stride = seq_len if bos_token_id is None else seq_len - 1
    count = ids.numel() // stride
    if count == 0:
        raise DataError(
            f"the text has {ids.numel()} tokens, one window of seq_len={seq_len} needs {stride};"
            " use more text or a smaller seq_len"
        )
    windows = ids[: count * stride].reshape(count, stride)
    if bos_token_id is not None:
        windows = torch.cat([torch.full((count, 1), bos_token_id), windows], dim=1)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"token ids lie in [{low}, {high}], the model's vocabulary is [0, {vocab_size}); was"
            " the text encoded with this model's tokenizer?"
        )
    return windows


def _has_plain_head(model: nn.Module) -> bool:
    """Whether ``logits == model.lm_head(model.model(ids).last_hidden_state)``."""
    config = getattr(model, "config", None)
    return (
        type(model).__name__.endswith("ForCausalLM")
        and isinstance(getattr(model, "model", None), nn.Module)
        and isinstance(getattr(model, "lm_head", None), nn.Module)
        and not any(getattr(config, name, None) is not None for name in _LOGIT_TRANSFORMS)
    )


def _nll_sum(model: Any, ids: torch.Tensor, chunk: int) -> float:
    """Summed negative log-likelihood of a batch of windows, int64 [b, seq_len]."""
    targets = ids[:, 1:].reshape(-1)
    if _has_plain_head(model):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        rows, head = hidden.reshape(-1, hidden.shape[-1]), model.lm_head
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        rows, head = logits.reshape(-1, logits.shape[-1]), nn.Identity()
    total = 0.0
    for begin in range(0, rows.shape[0], chunk):
        logits = head(rows[begin : begin + chunk]).float()
        losses = F.cross_entropy(logits, targets[begin : begin + chunk], reduction="none")
        total += float(losses.double().sum())
    return total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: a module that caches what it computes here may train with it later.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def perplexity(
    model: nn.Module,
    input_ids: torch.Tensor | Sequence[int],
    seq_len: int = 2048,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    bos_token_id: int | None = None,
) -> PerplexityResult:
    """Token perplexity of a causal language model; the definition heads this module.

    Args:
        model: a transformers ``*ForCausalLM``, plain, prepared or converted. Its logits are never
            held whole in fp32 where they are ``lm_head`` of the last hidden states.
        input_ids: integer token ids of the text, [n] or [1, n], on any device.
        seq_len: ids per window.
        max_tokens: use only the first ``max_tokens`` ids of the text.
        batch_size: windows per forward pass; changes speed and memory only.
        progress: show a progress bar with the running perplexity on stderr.
        bos_token_id: put this id first in each window.

    Returns:
        Perplexity, nats per token and what they were measured over.

    Raises:
        DataError: empty text, less than one window, or ids outside the vocabulary.
        InvalidArgument: ``seq_len`` below 2 or above the model's positions, or another argument
            out of range.
        InvalidArgumentType: ``input_ids`` is not a tensor or sequence of integers.
        FloatingPointError: the model's loss is NaN or infinite.
    """
    if batch_size < 1:
        raise InvalidArgument(f"batch_size: expected a positive number, got {batch_size}")
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise InvalidArgument(f"seq_len: the model has {positions} positions, got {seq_len}")
    embedding = cast(nn.Embedding, cast(Any, model).get_input_embeddings())
    vocab_size = getattr(config, "vocab_size", None) or embedding.num_embeddings
    windows = _windows(input_ids, seq_len, max_tokens, bos_token_id, vocab_size)
    chunk = max(1, _CHUNK_ELEMENTS // vocab_size)

    total, tokens = 0.0, 0
    with (
        evaluating(model),
        tqdm(total=len(windows), unit="window", desc="perplexity", disable=not progress) as bar,
    ):
        for begin in range(0, len(windows), batch_size):
            batch = windows[begin : begin + batch_size].to(embedding.weight.device)
            loss = _nll_sum(model, batch, chunk)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of windows {begin}..{begin + len(batch) - 1} is {loss}: the weights"
                    " or activations hold NaN or Inf, or overflow their dtype"
                )
            total += loss
            tokens += len(batch) * (seq_len - 1)
            bar.update(len(batch))
            bar.set_postfix_str(f"ppl {exp_or_inf(total / tokens):.3f}", refresh=False)
    nll = total / tokens
    return PerplexityResult(exp_or_inf(nll), nll, tokens, seq_len, len(windows))


def exp_or_inf(nll: float) -> float:
    """``exp`` that gives infinity where a hopeless model's perplexity leaves fp64."""
    return math.exp(nll) if nll < 700 else math.inf
