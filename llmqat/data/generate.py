"""The teacher writes its own training text (LLM-QAT section 2.1): three strategies, batched,
resumable.

`hybrid`, the paper's method, starts from a random token of the vocabulary (or walks through it),
takes the most likely token 3 to 5 times and then samples from the whole softmax; `greedy` and
`sampled` are the two it was compared with. The released code enumerates the first token, decodes at
batch 1 and samples with top_k 50: `first_token="enumerate"`, `top_k=50`.

A record is a function of (teacher, recipe, record id): the counter-based generator (spec 15) is
keyed by seed, record and step. Step t > 0 chooses token t of the record, step 0 its first token,
and a step that no sequence reaches the number of greedy tokens. Slots, shards, order and restarts
therefore give the same records. On the CPU this holds bit for bit (a row of logits does not depend
on the other rows); where a matrix product depends on the batch (the reference backend, GPUs), a
near tie may fall the other way.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from llmqat.data.records import Record
from llmqat.data.store import RecordWriter
from llmqat.errors import ConfigError, DataError
from llmqat.runtime.sampling import Sampler, Sampling
from llmqat.runtime.scheduler import Completion, Request
from llmqat.runtime.token_engine import TokenEngine

STRATEGIES = ("hybrid", "greedy", "sampled")
FIRST_TOKENS = ("random", "enumerate")
FIRST_TOKEN_STEP = 0
N_GREEDY_STEP = 2**32 - 1
"""The largest step of the generator's counter: no sequence is that long."""
PLANNED_AT_ONCE = 8


@dataclass(frozen=True)
class Recipe:
    """How the records are written.

    Args:
        strategy: `hybrid` (greedy prefix, then the softmax), `greedy` or `sampled`.
        first_token: `random`, or `enumerate`: record i starts with the i-th usable token, again
            from the front after the last.
        max_len: tokens per record, the first one included.
        temperature, top_k, seed: of the sampled tokens; top_k 0 is the full softmax.
        greedy_min, greedy_max: the greedy prefix of a hybrid record is drawn from this range.

    Raises:
        ConfigError: a value out of range.
    """

    strategy: str = "hybrid"
    first_token: str = "random"
    max_len: int = 2048
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    greedy_min: int = 3
    greedy_max: int = 5

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("strategy", self.strategy, STRATEGIES),
            ("first_token", self.first_token, FIRST_TOKENS),
        ):
            if value not in accepted:
                raise ConfigError(f"{name}: {value!r} is not supported; use {', '.join(accepted)}")
        if self.max_len < 2:
            raise ConfigError(f"max_len: {self.max_len} leaves nothing to write; use at least 2")
        if not 0 <= self.greedy_min <= self.greedy_max:
            raise ConfigError(
                f"greedy_min, greedy_max: {self.greedy_min}..{self.greedy_max} is not a range"
            )
        self.sampling  # noqa: B018 - validates temperature, top_k and seed

    @property
    def sampling(self) -> Sampling:
        """The sampling settings."""
        return Sampling(self.seed, self.temperature, self.top_k, greedy=self.strategy == "greedy")


def usable_first_tokens(
    vocab_size: int, tokenizer: Any = None, stop_ids: Iterable[int] = ()
) -> list[int]:
    """The ids a record may start with, ascending: no special or added token, none beyond the
    tokenizer's vocabulary.

    Args:
        tokenizer: of transformers, or None: then only `stop_ids` are left out.

    Raises:
        DataError: nothing is left.
    """
    known, excluded = vocab_size, set(stop_ids)
    if tokenizer is not None:
        known = min(vocab_size, len(tokenizer))
        excluded.update(tokenizer.all_special_ids, tokenizer.added_tokens_decoder)
    usable = [token for token in range(known) if token not in excluded]
    if not usable:
        raise DataError(
            f"first_token: none of the {vocab_size} tokens can start a record; check the tokenizer"
        )
    return usable


def run_config(
    recipe: Recipe, engine: TokenEngine, first_tokens: Sequence[int], stop_ids: Iterable[int]
) -> dict[str, Any]:
    """What decides the records besides the teacher's weights: the manifest's configuration."""
    digest = hashlib.sha256(",".join(map(str, first_tokens)).encode()).hexdigest()
    return {
        **asdict(recipe),
        "vocab_size": engine.vocab_size,
        "stop_ids": sorted(stop_ids),
        "first_tokens": {"count": len(first_tokens), "sha256": digest},
        "dtype": str(engine.dtype).removeprefix("torch."),
        "kv_bits": engine.kv_bits,
        "kv_mode": engine.kv_mode if engine.kv_bits < 16 else None,
    }


class Planner:
    """The beginning of every record: its first token and the length of its greedy prefix."""

    def __init__(
        self, recipe: Recipe, first_tokens: Sequence[int], device: torch.device | str
    ) -> None:
        self.recipe = recipe
        self.first_tokens = first_tokens
        self.device = torch.device(device)
        # Equal logits make Gumbel-max a uniform choice: the sampling kernel is the only generator
        # in use.
        self._draw = Sampler(Sampling(recipe.seed), device)

    def _uniform(self, choices: int, ids: Sequence[int], step: int) -> list[int]:
        logits = torch.zeros((len(ids), choices), dtype=torch.float32, device=self.device)
        return self._draw(logits, ids, [step] * len(ids), [False] * len(ids))

    def plan(self, ids: Sequence[int]) -> list[Request]:
        """The requests of the records `ids`."""
        recipe, count = self.recipe, len(self.first_tokens)
        if recipe.first_token == "enumerate":
            starts = [record % count for record in ids]
        else:
            starts = self._uniform(count, ids, FIRST_TOKEN_STEP)
        prefixes = [0] * len(ids)
        if recipe.strategy == "hybrid":
            drawn = self._uniform(recipe.greedy_max - recipe.greedy_min + 1, ids, N_GREEDY_STEP)
            prefixes = [recipe.greedy_min + extra for extra in drawn]
        return [
            Request(record, (self.first_tokens[start],), recipe.max_len, n_greedy)
            for record, start, n_greedy in zip(ids, starts, prefixes, strict=True)
        ]

    def requests(self, ids: Iterable[int]) -> Iterator[Request]:
        """Plan `ids` lazily, in their order."""
        waiting = iter(ids)
        while some := list(islice(waiting, PLANNED_AT_ONCE)):
            yield from self.plan(some)


def as_record(done: Completion, strategy: str) -> Record:
    """The stored form of a finished sequence; `n_greedy` counts the greedy tokens that were really
    written.
    """
    new = len(done.new_tokens)
    n_greedy = new if strategy == "greedy" else min(done.request.n_greedy, new)
    return Record(
        done.request.record,
        done.tokens,
        done.request.prompt[0],
        n_greedy,
        strategy,
        done.finish_reason,
    )


def generate_records(
    engine: TokenEngine,
    recipe: Recipe,
    ids: Iterable[int],
    first_tokens: Sequence[int],
    *,
    stop_ids: Iterable[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> Iterator[list[Record]]:
    """Write the records `ids`; yields, step by step, those that ended together.

    Raises:
        ConfigError: `recipe.max_len` exceeds the engine's.
    """
    if recipe.max_len > engine.max_len:
        raise ConfigError(f"max_len: {recipe.max_len} exceeds the engine's {engine.max_len}")
    requests = Planner(recipe, first_tokens, engine.device).requests(ids)
    for ended in engine.run(requests, recipe.sampling, stop_ids=stop_ids, on_step=on_step):
        yield [as_record(done, recipe.strategy) for done in ended]


@dataclass(frozen=True)
class Summary:
    """What one call of :func:`fill` did. `tokens` counts those chosen by the teacher, first tokens
    excluded.
    """

    records: int
    tokens: int
    seconds: float
    finish_reasons: dict[str, int]

    @property
    def tokens_per_second(self) -> float:
        """Chosen tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def errors(self) -> int:
        """Records that ended on non-finite logits."""
        return self.finish_reasons.get("error", 0)


def fill(
    writer: RecordWriter,
    engine: TokenEngine,
    recipe: Recipe,
    first_tokens: Sequence[int],
    *,
    stop_ids: Iterable[int] = (),
    progress: bool = True,
) -> Summary:
    """Write every record that `writer` misses. What it has stored survives any kill; the rest is
    made again the same.
    """
    missing = writer.missing()
    reasons: Counter[str] = Counter()
    begin, chosen = time.perf_counter(), 0
    bound = len(missing) * (recipe.max_len - 1)  # exact once the records that end early are known
    hidden = not (progress and missing)
    with tqdm(total=bound, unit="tok", desc="generate-data", disable=hidden) as bar:

        def count(tokens: int) -> None:
            nonlocal chosen
            chosen += tokens
            bar.update(tokens)

        for ended in generate_records(
            engine, recipe, missing, first_tokens, stop_ids=stop_ids, on_step=count
        ):
            writer.write(ended)
            reasons.update(record.finish_reason for record in ended)
            bound -= sum(recipe.max_len - record.length for record in ended)
            bar.total = bound
            errors = f", {reasons['error']} errors" if reasons["error"] else ""
            bar.set_postfix_str(f"{writer.stored}/{writer.total} records{errors}", refresh=False)
    return Summary(sum(reasons.values()), chosen, time.perf_counter() - begin, dict(reasons))
