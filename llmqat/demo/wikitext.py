"""Plain prose out of wiki markup, with the standard library alone.

Not a parser of the markup language: it removes what is not running text (templates, tables,
references, lists, headings, media) and keeps the visible words of what remains. The aim is
text that a language model finds ordinary, so sentences with holes matter more than lost ones:
the few templates that carry words of the sentence (units, foreign words) are expanded.
"""

# ruff: noqa: RUF001 (the dashes and quotation marks of real text are the subject here)

from __future__ import annotations

import html
import re

MIN_PARAGRAPH = 60
"""Characters; shorter lines are captions, labels and left-overs rather than prose."""

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# A self-closing tag must be tried first: `<ref name="a"/> text <ref>b</ref>` would lose `text`.
_EMPTY_TAG = re.compile(r"<(ref|references)\b[^<>]*/>", re.IGNORECASE)
_BLOCK_TAG = re.compile(
    r"<(ref|math|gallery|timeline|source|syntaxhighlight|pre|code|score|imagemap|table|blockquote"
    r"|poem|nowiki|div|center|chem|hiero)\b[^<>]*>.*?</\1\s*>",
    re.IGNORECASE | re.DOTALL,
)
_BREAK = re.compile(r"<(br|p|hr)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
_DROPPED_LINK = re.compile(
    r":?\s*(file|image|category|media|wikt|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE
)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]]*\s*([^\[\]]*)\]")
_QUOTES = re.compile(r"'{2,}")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f]+")
_BRACKET_START = re.compile(r"\(\s*(?:(?:[;,:/–-]|or|and)\s*)+")
_BRACKET_END = re.compile(r"(?:\s*[;,:/–-])*\s*\)")
_BRACKET_EMPTY = re.compile(r"\s*\(\s*\)")
_BEFORE_PUNCTUATION = re.compile(r"\s+([,.;:!?](?:\s|$))")
_DOUBLE_PUNCTUATION = re.compile(r"([,;])(?:\s*[,;])+")
_SENTENCE_END = re.compile(r"[.!?][\"”’)]*(?=\s)")

_FIRST_ARGUMENT = frozenset({"nowrap", "small", "nobold", "abbr", "em"})
_LAST_ARGUMENT = frozenset({"lang", "transl", "transliteration"})
_DASHES = {"snd": " – ", "spnd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—"}
_JOINTS = {
    "to": " to ",
    "-": "–",
    "–": "–",
    "and": " and ",
    "by": " by ",
    "x": " by ",
    "+/-": " ± ",
}


def _expand_template(body: str) -> str:
    """The words of a template that belong to its sentence; "" for every other template."""
    name, *arguments = (part.strip() for part in body.split("|"))
    name = name.lower()
    positional = [a for a in arguments if "=" not in a]
    if name in ("convert", "cvt") and len(positional) >= 2:
        if positional[1] in _JOINTS and len(positional) >= 4:
            low, joint, high, unit = positional[:4]
            return f"{low}{_JOINTS[joint]}{high} {unit}"
        return f"{positional[0]} {positional[1]}"
    if positional and name in _FIRST_ARGUMENT:
        return positional[0]
    if positional and (name in _LAST_ARGUMENT or name.startswith("lang-")):
        return positional[-1]
    return _DASHES.get(name, "")


def _replace_nested(text: str, opening: str, closing: str, expand: bool) -> str:
    """Removes (or expands) balanced, nested spans; an unbalanced opening drops the rest."""
    stack: list[list[str]] = [[]]
    for piece in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if piece == opening:
            stack.append([])
        elif piece == closing:
            if len(stack) > 1:
                body = "".join(stack.pop())
                stack[-1].append(_expand_template(body) if expand else "")
        else:
            stack[-1].append(piece)
    return "".join(stack[0])


def _resolve_links(text: str) -> str:
    """``[[page|words]]`` to ``words``, innermost first, so that captions holding links go whole."""

    def words(match: re.Match[str]) -> str:
        body = match.group(1)
        return "" if _DROPPED_LINK.match(body) else body.rsplit("|", 1)[-1]

    # External links hold wiki links and stand in captions of media links: before and after.
    text = _EXTERNAL.sub(r"\1", text)
    count = 1
    while count:
        text, count = _LINK.subn(words, text)
    text = _EXTERNAL.sub(r"\1", text)
    # What is left is unbalanced: the author's typing error, not a link.
    return text.replace("[[", "").replace("]]", "")


def _tidy(line: str) -> str:
    """Closes the holes that removed templates leave: ``( ; born 1902)`` to ``(born 1902)``."""
    line = _SPACES.sub(" ", line)
    line = _BRACKET_START.sub("(", line)
    line = _BRACKET_END.sub(")", line)
    line = line.replace("( ", "(")
    line = _BRACKET_EMPTY.sub("", line)
    line = _BEFORE_PUNCTUATION.sub(r"\1", line)
    return _DOUBLE_PUNCTUATION.sub(r"\1", line).strip()


def paragraphs(markup: str) -> list[str]:
    """The prose paragraphs of one article.

    Args:
        markup: the article's wiki markup, XML entities already decoded once.

    Returns:
        One string per paragraph, without line breaks, each at least :data:`MIN_PARAGRAPH` long
        and ending like a sentence. Empty for an article that holds no prose.
    """
    text = _COMMENT.sub("", markup)
    text = _EMPTY_TAG.sub("", text)
    count = 1
    while count:
        text, count = _BLOCK_TAG.subn("", text)
    text = _replace_nested(text, "{{", "}}", expand=True)
    text = _replace_nested(text, "{|", "|}", expand=False)
    text = _resolve_links(text)
    text = _QUOTES.sub("", text)
    text = _MAGIC_WORD.sub("", text)
    text = html.unescape(_TAG.sub("", _BREAK.sub(" ", text)))
    kept = []
    for raw in text.split("\n"):
        if raw[:1] in ("*", "#", ":", ";", "=", "|", "!", "{", "}", " "):
            continue
        line = _tidy(raw)
        if len(line) >= MIN_PARAGRAPH and line[-1] in '.!?"”)':
            kept.append(line)
    return kept


def excerpt(markup: str, characters: int) -> str:
    """The first ``characters`` of an article's prose, cut at the end of a sentence.

    Returns:
        Paragraphs joined by a newline, at most ``characters`` long; "" without prose.
    """
    text = "\n".join(paragraphs(markup))
    if len(text) <= characters:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, characters)]
    return text[: ends[-1]] if ends else ""
