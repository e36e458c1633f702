"""Calibration: the token batches, and the walk through the blocks that shows what each linear sees.

The walk keeps one tensor of hidden states per batch, on the CPU, and moves it from the door of one
block to the door of the next. What stands in front of a block is therefore always what the blocks
before it produce in their present, quantized form, and device memory holds one batch of one block.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmqat.data.dataset import PackedDataset
from llmqat.errors import ConfigError, DataError
from llmqat.models.families import Family, find_family, iter_blocks

__all__ = ["TOKEN_LIMIT", "BlockWalk", "Gram", "calibration_tokens", "fingerprint", "token_weights"]

StrPath = str | os.PathLike[str]
Observer = Callable[[Tensor], None]


def calibration_tokens(
    path: StrPath | Sequence[StrPath],
    *,
    sequences: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    tokenizer: Any = None,
    vocab_size: int | None = None,
) -> Tensor:
    """At most `sequences` blocks of `seq_len` ids, drawn with a seed from files or generated data.

    Documents are shuffled, joined and cut as for training (`PackedDataset`), then blocks are drawn
    without repetition. Equal arguments give equal tokens.

    Args:
        path: `.txt`, `.jsonl`, `.parquet` files or folders of generated records, one or several.
        tokenizer: needed for text; adds no special tokens.
        vocab_size: refuse ids outside it.

    Returns:
        int64 [n, seq_len], 1 <= n <= sequences; fewer only where the data has no more.

    Raises:
        ConfigError: an argument out of range. DataError: unreadable data, or less than one block.
    """
    for name, value, low in (("sequences", sequences, 1), ("seq_len", seq_len, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}: {value!r} is not supported; use an integer >= {low}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed: {seed!r} is not supported; use an integer >= 0")
    data = PackedDataset.from_path(
        path, seq_len, tokenizer=tokenizer, vocab_size=vocab_size, seed=seed
    )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(data))[:sequences]
    return torch.stack([data[int(index)]["input_ids"] for index in sorted(order)])


def fingerprint(model: nn.Module, tokens: Tensor) -> str:
    """SHA-256 over every parameter (name, type, bytes) and the calibration tokens."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    total.update(tokens.cpu().contiguous().numpy().data)
    return total.hexdigest()


class _Reached(Exception):
    """Ends a forward pass at the module that was asked for."""


class BlockWalk:
    """Calibration tokens on their way through a model, one block after another.

    Iterating yields (index, full name, block); the body quantizes the block and calls
    :meth:`advance` when its outputs are final.

    Args:
        model: a transformers model of a supported family, plain or prepared.
        tokens: int64 [n, T].
        batch_size: sequences per forward pass; memory and speed (sums of another order in the last
            bits).
        label: what the progress bar says; None shows none.

    Raises:
        ConfigError: unsupported model. DataError: tokens that the model cannot take.
    """

    def __init__(
        self, model: nn.Module, tokens: Tensor, *, batch_size: int = 8, label: str | None = None
    ) -> None:
        self.family: Family = find_family(model)
        self.blocks = list(iter_blocks(model, self.family))
        self.device = next(model.parameters()).device
        self._label = label
        self._bar: Any = None
        _check_tokens(model, tokens)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size!r} is not supported; use an integer >= 1")
        if len(set(getattr(model.config, "layer_types", None) or ())) > 1:
            raise ConfigError(
                "model: its blocks attend in different ways (layer_types); calibration runs models"
                " whose blocks are alike"
            )
        self.tokens = tokens.numel()
        self.hidden: list[Tensor] = []
        self._kwargs: dict[int, dict[str, Any]] = {}
        for batch in tokens.split(batch_size):
            hidden, kwargs = _entrance(model, self.blocks[0][1], batch.to(self.device))
            self.hidden.append(hidden.cpu())
            # Sequences are not padded, so batches of one size have the same mask and positions.
            self._kwargs.setdefault(hidden.shape[0], kwargs)

    def __iter__(self) -> Iterator[tuple[int, str, nn.Module]]:
        with tqdm(
            total=len(self.blocks), unit="block", desc=self._label, disable=self._label is None
        ) as self._bar:
            for index, (name, block) in enumerate(self.blocks):
                yield index, name, block
                self._bar.update()

    def note(self, text: str) -> None:
        """Show `text` behind the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def call(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for one batch of hidden states [b, T, H], on the model's device."""
        result = block(hidden.to(self.device), **self._kwargs[hidden.shape[0]])
        return result[0] if isinstance(result, tuple) else result

    @torch.no_grad()
    def inputs(self, block: nn.Module, linear: str) -> Iterator[Tensor]:
        """What `linear` of the block is given, batch by batch: float [b, T, K].

        The pass ends there, so nothing behind that linear is computed.
        """
        module = block.get_submodule(linear)
        for hidden in self.hidden:
            seen: list[Tensor] = []

            def stop(_: nn.Module, args: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
                seen.append(args[0])
                raise _Reached

            with _hooked({module: stop}):
                try:
                    self.call(block, hidden)
                except _Reached:
                    pass
            yield seen[0]

    @torch.no_grad()
    def run(
        self, block: nn.Module, observers: Mapping[str, Observer] | None = None
    ) -> list[Tensor]:
        """The block's outputs, on the CPU; an observer sees the inputs [b, T, K] of its linear."""
        hooks = {
            block.get_submodule(name): lambda _, args, observe=observe: observe(args[0])
            for name, observe in (observers or {}).items()
        }
        with _hooked(hooks):
            return [self.call(block, hidden).cpu() for hidden in self.hidden]

    def advance(self, block: nn.Module, outputs: list[Tensor] | None = None) -> None:
        """Go to the door of the next block: through `block`, or with the `outputs` it gave."""
        if block is not self.blocks[-1][1]:
            self.hidden = self.run(block) if outputs is None else outputs


TOKEN_LIMIT = 3.0
"""Default of `token_limit`: lengths of ordinary tokens differ by less than that."""


def token_weights(x: Tensor, limit: float) -> Tensor:
    """Factors in (0, 1], fp32 [..., 1], that cut tokens [..., K] to `limit` times the median norm.

    A few tokens of a sequence (attention sinks) are up to a thousand times longer than all others
    in some layers. A sum of squares over tokens then describes them alone, and what is best for it
    ruins the rest. `limit` 0 leaves every token as it is.
    """
    length = x.detach().float().norm(dim=-1, keepdim=True)
    if limit == 0:
        return torch.ones_like(length)
    bound = limit * length.median()
    return torch.where((length > bound) & (bound > 0), bound / length, torch.ones_like(length))


class Gram:
    """Sum of x x^T over the inputs x of a linear, fp64 [K, K]; products of a batch are fp32.

    Args:
        limit: as :func:`token_weights`, for each batch.
    """

    def __init__(self, limit: float = 0) -> None:
        self.tokens = 0
        self._limit = limit
        self._sum: Tensor | None = None
        self._abs: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Take in float [..., K]."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        rows = rows * token_weights(rows, self._limit)
        self.tokens += rows.shape[0]
        product, magnitude = (rows.T @ rows).double(), rows.abs().double().sum(0)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._abs = magnitude if self._abs is None else self._abs.add_(magnitude)

    @classmethod
    def of(cls, inputs: Iterator[Tensor], where: str, limit: float = 0) -> Gram:
        """Of all `inputs`; ConfigError naming `where` if one of them is NaN or infinite."""
        gram = cls(limit)
        for batch in inputs:
            gram.add(batch)
        if not bool(torch.isfinite(gram.matrix).all()):
            raise ConfigError(
                f"{where}: its calibration inputs hold NaN or infinite values; check the model"
            )
        return gram

    @property
    def matrix(self) -> Tensor:
        """The sum, fp64 [K, K]."""
        assert self._sum is not None, "no inputs yet"
        return self._sum

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |x| of every channel, fp64 [K]."""
        assert self._abs is not None, "no inputs yet"
        return self._abs / self.tokens


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise DataError("tokens: expected int64 [n, T]; calibration_tokens() makes them")
    if not tokens.numel():
        raise DataError("tokens: no calibration tokens; give at least one sequence")
    vocab, positions = model.config.vocab_size, model.config.max_position_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise DataError(f"tokens: ids lie in [{low}, {high}], the vocabulary is [0, {vocab})")
    if tokens.shape[1] > positions:
        raise DataError(
            f"tokens: {tokens.shape[1]} ids a sequence, the model has {positions} positions"
        )


@torch.no_grad()
def _entrance(model: nn.Module, block: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states and keyword arguments that the first block is called with."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        # By name: blocks of some families are handed their mask by position.
        names = list(inspect.signature(block.forward).parameters)
        kwargs |= dict(zip(names, args, strict=False))
        seen.append((kwargs.pop("hidden_states"), kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
